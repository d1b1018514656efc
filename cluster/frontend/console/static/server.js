// Requests to the server that this page came from, with the user's key where it asks for one.

const KEY = "remuda-key";
const BASE = new URL("../", document.baseURI);

let key = sessionStorage.getItem(KEY);

export const hasKey = () => key !== null;

/** For this tab, until it is closed or the key is forgotten. */
export function useKey(value) {
  key = value;
  sessionStorage.setItem(KEY, value);
}

export function forgetKey() {
  key = null;
  sessionStorage.removeItem(KEY);
}

/** What the server refused, or (status 0) that it did not answer. */
export class ServerError extends Error {
  constructor(status, message, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The error in an answer's body, in OpenAI's form; whatever else stands there, its status. */
async function refusal(response) {
  try {
    const { error } = await response.json();
    return new ServerError(response.status, error.message, error.code);
  } catch {
    return new ServerError(response.status, `The server answered ${response.status} ${response.statusText}.`);
  }
}

/** A good answer. `path` begins without a slash. Throws ServerError, and AbortError where `signal` says so. */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (key !== null) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, BASE), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export const askJson = async (path, options) => (await ask(path, options)).json();
