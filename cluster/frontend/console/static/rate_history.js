// Tokens per second, from a counter that is read now and then: the last seconds as a number, two minutes as a line.

import { number, setText } from "./page.js";

const SPAN_MS = 120_000;
const AVERAGE_MS = 3000;
const SVG = "http://www.w3.org/2000/svg";

export class RateHistory {
  #samples = [];
  #caption;
  #line = document.createElementNS(SVG, "polyline");
  #area = document.createElementNS(SVG, "polygon");

  /** `image`: an svg element whose viewBox is 120 × 32. */
  constructor(image, caption) {
    this.#caption = caption;
    this.#area.classList.add("area");
    image.append(this.#area, this.#line);
  }

  add(count) {
    const nowMs = performance.now();
    const last = this.#samples.at(-1);
    if (last && count < last.count) this.#samples = []; // another front end answers, or this one is new
    this.#samples.push({ ms: nowMs, count });
    while (this.#samples[0].ms < nowMs - SPAN_MS) this.#samples.shift();
    this.#draw(nowMs);
  }

  /** Over the last seconds. */
  get text() {
    const rate = this.#rateBefore(this.#samples.length - 1);
    return rate < 10 && rate > 0 ? rate.toFixed(1) : number(Math.round(rate));
  }

  #rateBefore(index) {
    const end = this.#samples[index];
    const begin = this.#samples.findLast(({ ms }, at) => at < index && ms <= end.ms - AVERAGE_MS) ?? this.#samples[0];
    return end.ms > begin.ms ? ((end.count - begin.count) * 1000) / (end.ms - begin.ms) : 0;
  }

  #draw(nowMs) {
    const rates = this.#samples.map((_, index) => this.#rateBefore(index));
    const most = Math.max(...rates);
    const points = this.#samples.map(({ ms }, index) => {
      const x = 120 - ((nowMs - ms) * 120) / SPAN_MS;
      const y = 31 - (30 * rates[index]) / (most || 1);
      return `${x.toFixed(2)},${y.toFixed(2)}`;
    });
    this.#line.setAttribute("points", points.join(" "));
    const first = points[0].split(",")[0];
    this.#area.setAttribute("points", `${first},32 ${points.join(" ")} 120,32`);
    setText(this.#caption, `The last two minutes, at most ${number(Math.round(most))} tokens/s`);
  }
}
