// What /v1/status says, asked for each second while somebody can see it.

import { byId, number, percent, setText, show } from "./page.js";
import { RateHistory } from "./rate_history.js";
import { ReplicaView } from "./replica.js";
import { askJson } from "./server.js";

const INTERVAL_MS = 1000;
const RETRY_MS = 3000;

export class State {
  #askForKey;
  #timer = null;
  #isOn = false;
  #turn = 0; // what was asked for in an earlier one is not shown
  #replicas = new Map();
  #rate = new RateHistory(byId("rate-history"), byId("rate-caption"));

  /** `askForKey(why)` is called when the server does not take the key any more. */
  constructor(askForKey) {
    this.#askForKey = askForKey;
    document.addEventListener("visibilitychange", () => {
      if (this.#isOn && !document.hidden) this.start();
    });
  }

  start() {
    this.#isOn = true;
    clearTimeout(this.#timer);
    this.#look(++this.#turn);
  }

  stop() {
    this.#isOn = false;
    this.#turn++;
    clearTimeout(this.#timer);
    show(byId("state-body"), false);
    show(byId("server-state"), false);
    this.#notice(null);
  }

  async #look(turn) {
    let waitMs = INTERVAL_MS;
    try {
      const status = await askJson("v1/status");
      if (turn !== this.#turn) return;
      this.#show(status);
    } catch (error) {
      if (turn !== this.#turn) return;
      if (error.status === 401 || error.status === 403) {
        this.stop();
        if (error.status === 401) this.#askForKey("The server does not take this key any more.");
        else this.#notice(`The state is not shown: ${error.message}`);
        return;
      }
      if (error.status === undefined) throw error; // a defect of this page: the browser's console has it
      const isOld = !byId("state-body").hidden;
      this.#notice(error.message.replace(/\.?$/, ".") + (isOld ? " What is shown is old." : ""));
      waitMs = RETRY_MS;
    }
    if (!document.hidden) this.#timer = setTimeout(() => this.#look(turn), waitMs);
  }

  #notice(text) {
    const line = byId("state-notice");
    setText(line, text ?? "");
    show(line, text !== null);
    byId("state-body").classList.toggle("old", text !== null);
  }

  #show(status) {
    this.#notice(null);
    show(byId("state-body"), true);
    this.#rate.add(status.num_generated_tokens);
    const sum = (name) => status.replicas.reduce((total, replica) => total + replica[name], 0);
    const usage = Math.max(0, ...status.replicas.map((replica) => replica.kv_cache_usage));
    setText(byId("version"), `version ${status.version}`);
    setText(byId("tokens-per-s"), this.#rate.text);
    setText(byId("live-requests"), number(status.num_live_requests));
    setText(byId("running-waiting"), `${number(sum("num_running"))}, ${number(sum("num_waiting"))}`);
    setText(byId("kv-usage"), percent(usage));
    const badge = byId("server-state");
    badge.dataset.state = status.draining ? "draining" : bestOf(status.replicas);
    setText(badge, badge.dataset.state);
    show(badge, true);
    this.#showReplicas(status.replicas);
  }

  #showReplicas(replicas) {
    const ids = new Set(replicas.map((replica) => replica.id));
    for (const [id, view] of this.#replicas) {
      if (ids.has(id)) continue;
      view.remove();
      this.#replicas.delete(id);
    }
    for (const replica of replicas) {
      if (!this.#replicas.has(replica.id)) this.#replicas.set(replica.id, new ReplicaView(byId("replicas")));
      this.#replicas.get(replica.id).show(replica);
    }
  }
}

const BEST_FIRST = ["ready", "repairing", "starting", "draining", "failed"];

const bestOf = (replicas) =>
  BEST_FIRST.find((state) => replicas.some((replica) => replica.state === state)) ?? "starting";
