// One replica: its state, its ranks, its experts. Elements stay, their texts change.

import { ExpertHeatMap } from "./expert_heat_map.js";
import { copyOf, number, percent, setText, show } from "./page.js";

const NUM_COLUMNS = 8;
const NUMBER_COLUMNS = [4, 7];

export class ReplicaView {
  #root = copyOf("replica-template").firstElementChild;
  #experts = null;

  constructor(place) {
    place.append(this.#root);
  }

  remove() {
    this.#root.remove();
  }

  show(replica) {
    setText(this.#find(".id"), `Replica ${replica.id}`);
    const badge = this.#find(".badge");
    badge.dataset.state = replica.state;
    setText(badge, replica.state);
    setText(this.#find(".error"), replica.error);
    show(this.#find(".error"), replica.error !== "");
    this.#showFacts(replica);
    const meter = this.#find(".meter");
    meter.setAttribute("aria-valuenow", String(Math.round(100 * replica.kv_cache_usage)));
    meter.firstElementChild.style.width = `${100 * replica.kv_cache_usage}%`;
    this.#find(".scroll").setAttribute("aria-label", `Ranks of ${replica.id}`);
    this.#showRanks(replica.ranks);
    if (replica.experts && Object.keys(replica.experts.layers).length) {
      this.#experts ??= new ExpertHeatMap(this.#find(".experts"));
      this.#experts.show(replica.experts);
    }
  }

  #find(selector) {
    return this.#root.querySelector(selector);
  }

  #showFacts(replica) {
    const facts = [
      ["KV cache", percent(replica.kv_cache_usage)],
      ["Running", number(replica.num_running)],
      ["Waiting", number(replica.num_waiting)],
      ["Steps", number(replica.num_steps)],
      ["Context", `${number(replica.max_model_len)} tokens`],
      ["Leader", replica.address],
    ];
    const list = this.#find(".facts");
    while (list.childElementCount < facts.length) {
      const fact = list.appendChild(document.createElement("div"));
      fact.append(document.createElement("dt"), document.createElement("dd"));
    }
    facts.forEach(([name, value], index) => {
      setText(list.children[index].firstElementChild, name);
      setText(list.children[index].lastElementChild, value);
    });
  }

  #showRanks(ranks) {
    const body = this.#find("tbody");
    while (body.rows.length > ranks.length) body.deleteRow(-1);
    while (body.rows.length < ranks.length) addRow(body);
    ranks.forEach((rank, index) => {
      const cells = body.rows[index].cells;
      body.rows[index].dataset.state = rank.state;
      const texts = [
        String(rank.rank),
        rank.state,
        rank.operation ? number(rank.step) : "",
        rank.state === "idle" ? "" : rank.operation,
        rank.operation && rank.state !== "idle" ? `${rank.since_s.toFixed(1)} s` : "",
        rank.device,
        rank.host,
        String(rank.pid),
      ];
      texts.forEach((text, column) => setText(cells[column], text));
    });
  }
}

function addRow(body) {
  const row = body.insertRow();
  for (let column = 0; column < NUM_COLUMNS; column++) {
    const cell = row.insertCell();
    if (NUMBER_COLUMNS.includes(column)) cell.className = "number";
  }
}
