// Server-sent events, as OpenAI's API sends them: JSON in `data:`, and `[DONE]` at the end.

import { ServerError } from "./server.js";

/** The values of one stream. Throws ServerError where the stream says so, or ends before it is done. */
export async function* eventsOf(response) {
  let rest = "";
  for await (const part of textOf(response.body)) {
    const lines = (rest + part).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      // Comments keep the connection busy; ids are for clients that come back.
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new ServerError(response.status, value.error.message, value.error.code);
      yield value;
    }
  }
  throw new ServerError(0, "The connection broke before the answer was complete.");
}

async function* textOf(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {}); // of a stream that broke: it has said so above
  }
}
