// A conversation with the model: sent as a whole each time, shown as it is written.

import { eventsOf } from "./events.js";
import { ask, ServerError } from "./server.js";
import { byId, copyOf, number, show } from "./page.js";

const NEAR_END_PX = 40;
const LEAST_RATE_S = 0.25; // what came within less says nothing of how fast tokens come

const log = byId("log");
const message = byId("message");

let conversation = [];
let running = null;

export function startChat() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  message.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  byId("stop").addEventListener("click", stop);
  byId("new-chat").addEventListener("click", clear);
  message.focus();
}

/** The model and its adapters, of which one is chosen. */
export function offerModels(names) {
  const select = byId("model");
  const before = select.value;
  select.replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(before)) select.value = before;
}

function stop() {
  running?.abort();
  message.focus();
}

function clear() {
  running?.abort();
  conversation = [];
  log.querySelectorAll(".message").forEach((each) => each.remove());
  show(byId("empty"), true);
  showError(null);
  message.focus();
}

async function send() {
  const text = message.value.trim();
  if (!text || running) return;
  if (!optionsAreGood()) return;
  const abort = new AbortController();
  setRunning(abort);
  showError(null);
  message.value = "";
  const asked = { role: "user", content: text };
  const question = addMessage("You", text, "user");
  const view = addMessage(byId("model").value || "Model", "", "assistant");
  view.setAttribute("aria-busy", "true"); // screen readers wait for the whole
  const answer = new Answer(view);
  try {
    await answer.read(await ask("v1/chat/completions", { body: bodyOf(asked), signal: abort.signal }));
  } catch (error) {
    answer.fail(error);
    if (error.name !== "AbortError") showError(messageOf(error));
  }
  view.removeAttribute("aria-busy");
  if (running === abort) setRunning(null);
  if (!question.isConnected) return; // the conversation was cleared
  if (answer.text) {
    conversation.push(asked, { role: "assistant", content: answer.text });
    return;
  }
  if (answer.isDone) return; // it has no text, and its note says how many tokens
  view.remove();
  question.remove();
  show(byId("empty"), log.querySelector(".message") === null);
  message.value ||= text;
}

/** What is wrong is pointed out, where it can be seen. */
function optionsAreGood() {
  const wrong = document.querySelector(".options input:invalid");
  if (!wrong) return true;
  wrong.closest("details").open = true;
  wrong.reportValidity();
  return false;
}

const messageOf = (error) => {
  if (error instanceof ServerError) return error.message;
  console.error(error);
  return `The answer could not be read: ${error.message}`;
};

function bodyOf(asked) {
  const system = byId("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation, asked],
    stream: true,
    stream_options: { include_usage: true },
  };
  if (byId("model").value) body.model = byId("model").value;
  if (byId("temperature").value !== "") body.temperature = Number(byId("temperature").value);
  if (byId("max-tokens").value !== "") body.max_tokens = Number(byId("max-tokens").value);
  return body;
}

/** One answer, on its way into the page. */
class Answer {
  text = "";
  isDone = false;
  #view;
  #node;
  #beganMs = performance.now();
  #firstMs = null;
  #lastMs = null;
  #reason = null;
  #usage = null;

  constructor(view) {
    this.#view = view;
    this.#node = view.querySelector(".text").appendChild(new Text(""));
  }

  async read(response) {
    for await (const chunk of eventsOf(response)) {
      if (chunk.usage) this.#usage = chunk.usage;
      for (const choice of chunk.choices) {
        if (choice.delta.content) this.#add(choice.delta.content);
        this.#reason = choice.finish_reason ?? this.#reason;
      }
    }
    this.isDone = true;
    this.#note(this.#summary());
  }

  fail(error) {
    this.#note(error.name === "AbortError" ? "Stopped" : "Broken off");
  }

  #add(text) {
    this.#lastMs = performance.now();
    this.#firstMs ??= this.#lastMs;
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
    this.text += text;
    this.#node.appendData(text);
    if (follows) log.scrollTop = log.scrollHeight;
  }

  #note(text) {
    const note = this.#view.querySelector(".note");
    note.textContent = text;
    show(note, true);
  }

  #summary() {
    const parts = [];
    const count = this.#usage?.completion_tokens ?? 0;
    if (this.#usage) parts.push(`${number(this.#usage.prompt_tokens)} tokens in, ${number(count)} out`);
    if (this.#firstMs !== null) {
      parts.push(`first after ${((this.#firstMs - this.#beganMs) / 1000).toFixed(2)} s`);
      const seconds = (this.#lastMs - this.#firstMs) / 1000;
      if (count > 1 && seconds > LEAST_RATE_S) parts.push(`then ${((count - 1) / seconds).toFixed(1)} tokens/s`);
    }
    if (this.#reason === "length") parts.push("cut off at max tokens");
    return parts.join(" · ");
  }
}

function addMessage(who, text, role) {
  show(byId("empty"), false);
  const view = copyOf("message-template").firstElementChild;
  view.classList.add(role);
  view.querySelector("h3").textContent = who;
  view.querySelector(".text").textContent = text;
  log.append(view);
  log.scrollTop = log.scrollHeight;
  return view;
}

function setRunning(abort) {
  running = abort;
  show(byId("stop"), abort !== null);
  show(byId("send"), abort === null);
}

function showError(text) {
  const line = byId("chat-error");
  line.textContent = text ?? "";
  show(line, text !== null);
}
