// The page: who may see it, the chat, the state.

import { offerModels, startChat } from "./chat.js";
import { byId, setText, show } from "./page.js";
import { askJson, forgetKey, hasKey, useKey } from "./server.js";
import { State } from "./state.js";

const RETRY_MS = 3000;

const state = new State(askForKey);

function askForKey(why) {
  show(byId("key-form"), true);
  show(byId("forget-key"), hasKey());
  setText(byId("key-notice"), why);
}

/** Everything again, with the key that there is now. */
async function enter() {
  let models;
  try {
    models = await askJson("v1/models");
  } catch (error) {
    if (error.status === undefined) throw error; // a defect of this page: the browser's console has it
    if (error.status === 401) {
      askForKey(hasKey() ? "The server refused this key." : "The server asks for a key. It stays in this tab.");
    } else if (error.status === 403) {
      askForKey(`This key cannot chat: ${error.message}`);
      state.start();
    } else {
      setText(byId("model-name"), error.message);
      setTimeout(enter, RETRY_MS);
    }
    return;
  }
  show(byId("key-form"), false);
  show(byId("forget-key"), hasKey());
  const names = models.data.map((model) => model.id);
  setText(byId("model-name"), names[0] ?? "");
  offerModels(names);
  byId("message").focus();
  state.start();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  byId("key").value = "";
  enter();
});

byId("forget-key").addEventListener("click", () => {
  forgetKey();
  state.stop();
  show(byId("forget-key"), false);
  enter();
});

startChat();
enter();
