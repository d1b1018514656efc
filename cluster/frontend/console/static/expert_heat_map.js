// How many of a mixture's tokens each expert gets: a row for each layer, a column for each expert. A cell's colour says
// how much of its layer's mean the expert has had lately.

import { copyOf, number, setText } from "./page.js";

const LABEL_PX = 34;
const LEAST_PX = 4;
const MOST_WIDE_PX = 40;
const MOST_HIGH_PX = 18;
const HEAD_PX = 14;
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export class ExpertHeatMap {
  #place;
  #canvas;
  #layers = [];
  #cell = null;
  #most = 2;
  #wide = 0;
  #high = 0;

  constructor(place) {
    place.append(copyOf("experts-template"));
    this.#place = place;
    this.#canvas = place.querySelector("canvas");
    this.#canvas.addEventListener("pointermove", (event) => this.#pick(this.#cellAt(event)));
    this.#canvas.addEventListener("pointerleave", () => this.#pick(null));
    this.#canvas.addEventListener("blur", () => this.#pick(null));
    this.#canvas.addEventListener("keydown", (event) => this.#move(event));
    new ResizeObserver(() => this.#draw()).observe(place);
    document.addEventListener("theme", () => this.#draw());
  }

  show(experts) {
    this.#layers = Object.entries(experts.layers)
      .map(([layer, pairs]) => ({ layer: Number(layer), pairs, mean: pairs.reduce((a, b) => a + b, 0) / pairs.length }))
      .sort((one, other) => one.layer - other.layer);
    const shares = this.#layers.flatMap(({ pairs, mean }) => (mean ? pairs.map((count) => count / mean) : []));
    this.#most = shares.reduce((most, share) => Math.max(most, share), 2);
    const summary =
      `A row for each layer, a column for each expert. The busiest ranks have ${experts.imbalance.toFixed(2)} of the ` +
      `mean; ${number(experts.num_moves)} tables changed, ${number(experts.num_failed_moves)} given up.`;
    setText(this.#place.querySelector(".summary"), summary);
    setText(this.#place.querySelector(".low"), "none");
    setText(this.#place.querySelector(".high"), `${this.#most.toFixed(1)} × the layer's mean`);
    const size = `${this.#layers.length} layers, ${this.#layers[0].pairs.length} experts`;
    this.#canvas.setAttribute("aria-label", `Load of experts, ${size}. Arrow keys move from cell to cell.`);
    this.#draw();
    this.#tell();
  }

  #draw() {
    if (!this.#layers.length) return;
    const numExperts = this.#layers[0].pairs.length;
    const room = this.#place.clientWidth - LABEL_PX;
    this.#wide = Math.max(LEAST_PX, Math.min(MOST_WIDE_PX, Math.floor(room / numExperts)));
    this.#high = Math.max(LEAST_PX, Math.min(MOST_HIGH_PX, this.#wide));
    const width = LABEL_PX + this.#wide * numExperts;
    const height = HEAD_PX + this.#high * this.#layers.length;
    const scale = devicePixelRatio;
    this.#canvas.width = width * scale;
    this.#canvas.height = height * scale;
    this.#canvas.style.width = `${width}px`;
    this.#canvas.style.height = `${height}px`;
    const context = this.#canvas.getContext("2d");
    context.scale(scale, scale);
    const ramp = getComputedStyle(this.#place.querySelector(".ramp"));
    this.#drawLabels(context, numExperts);
    this.#layers.forEach(({ pairs, mean }, row) => {
      pairs.forEach((count, column) => {
        context.fillStyle = ramp.backgroundColor;
        this.#fill(context, row, column);
        context.globalAlpha = mean ? count / mean / this.#most : 0;
        context.fillStyle = ramp.color;
        this.#fill(context, row, column);
        context.globalAlpha = 1;
      });
    });
    this.#drawCell(context);
  }

  #fill(context, row, column) {
    const gap = this.#wide > 6 ? 1 : 0;
    const [x, y] = this.#cornerOf(row, column);
    context.fillRect(x, y, this.#wide - gap, this.#high - gap);
  }

  /** Of every n-th row and column, so that they do not overlap. */
  #drawLabels(context, numExperts) {
    const style = getComputedStyle(this.#canvas);
    context.font = `10px ${style.fontFamily}`;
    context.fillStyle = style.color;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const everyRow = Math.ceil(11 / this.#high);
    this.#layers.forEach(({ layer }, row) => {
      if (row % everyRow) return;
      const [x, y] = this.#cornerOf(row, 0);
      context.fillText(String(layer), x - 6, y + this.#high / 2);
    });
    context.textAlign = "center";
    const everyColumn = Math.ceil(22 / this.#wide);
    for (let column = 0; column < numExperts; column += everyColumn) {
      context.fillText(String(column), this.#cornerOf(0, column)[0] + this.#wide / 2, HEAD_PX / 2 - 1);
    }
  }

  #drawCell(context) {
    if (!this.#cell) return;
    context.strokeStyle = getComputedStyle(this.#canvas).outlineColor;
    context.lineWidth = 2;
    context.strokeRect(...this.#cornerOf(...this.#cell), this.#wide - 1, this.#high - 1);
  }

  #cornerOf(row, column) {
    return [LABEL_PX + column * this.#wide, HEAD_PX + row * this.#high];
  }

  #cellAt({ offsetX, offsetY }) {
    return this.#within(Math.floor((offsetY - HEAD_PX) / this.#high), Math.floor((offsetX - LABEL_PX) / this.#wide));
  }

  #within(row, column) {
    const isInside = row >= 0 && row < this.#layers.length && column >= 0 && column < this.#layers[0].pairs.length;
    return isInside ? [row, column] : null;
  }

  #move(event) {
    const [down, right] = ARROWS[event.key] ?? [];
    if (down === undefined) return;
    event.preventDefault();
    const [row, column] = this.#cell ?? [0, 0];
    this.#pick(this.#cell ? (this.#within(row + down, column + right) ?? this.#cell) : [0, 0]);
  }

  #pick(cell) {
    this.#cell = cell;
    this.#draw();
    this.#tell();
  }

  #tell() {
    let text = "";
    if (this.#cell) {
      const [row, column] = this.#cell;
      const { layer, pairs, mean } = this.#layers[row];
      const share = mean ? `, ${(pairs[column] / mean).toFixed(2)} × the mean` : "";
      text = `Layer ${layer}, expert ${column}: ${number(pairs[column])} tokens lately${share}`;
    }
    setText(this.#place.querySelector(".cell"), text);
  }
}
