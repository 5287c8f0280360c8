// Every routed expert as a cell: its column within the layer's row, hue by tier, brightness by use. One ImageData of the
// whole map, so 43 x 256 cells cost a millisecond or two.
import { colour, h } from "./dom.js";
import { number } from "./format.js";

const TIERS = { g: "GPU", c: "RAM", n: "NVMe" };
const DIMMEST = 0.22;
const WIDEST = 22, LOWEST = 7;  // of a cell, in CSS pixels

export class ExpertMap {
  constructor() {
    this.canvas = h("canvas", { class: "map", tabindex: "0", role: "img", "aria-describedby": "map-tip" });
    this.tip = h("div", { id: "map-tip", class: "tip", role: "status", hidden: true });
    this.root = h("div", { class: "map-frame" }, this.canvas, this.tip);
    this.canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event.offsetX, event.offsetY)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  show(data) {
    const before = this.data?.layers === data.layers ? this.data.tiers : data.tiers;
    this.moved = data.tiers.map((row, layer) => [...row].map((tier, expert) => before[layer]?.[expert] !== tier));
    this.data = data;
    this.canvas.setAttribute("aria-label", `Experts: ${data.layers} layers of ${data.experts}; arrow keys go from cell to cell`);
    this.canvas.dataset.layers = data.layers;
    this.canvas.dataset.experts = data.experts;
    this.draw();
    if (this.cell) this.point(this.cell);
  }

  draw() {
    const { data } = this;
    const available = this.root.clientWidth;
    if (!data || !available) return;
    const scale = devicePixelRatio || 1;
    const width = Math.min((available * scale) / data.experts, WIDEST * scale);
    this.size = { width, height: Math.round(Math.max(width, LOWEST * scale)), scale };
    this.canvas.width = Math.floor(width * data.experts);
    this.canvas.height = this.size.height * data.layers;
    this.canvas.style.width = `${this.canvas.width / scale}px`;
    this.canvas.style.height = `${this.canvas.height / scale}px`;
    this.paint();
  }

  paint() {
    const { data, size, canvas } = this;
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const pixels = new Uint32Array(image.data.buffer);
    const colours = { g: colour("--tier-gpu"), c: colour("--tier-ram"), n: colour("--tier-nvme") };
    const base = colour("--map");
    const gap = size.width >= 5 * size.scale ? Math.round(size.scale) : 0;
    const left = (expert) => Math.floor(expert * size.width);  // columns differ by a pixel where the width is no multiple
    for (let layer = 0; layer < data.layers; ++layer)
      for (let expert = 0; expert < data.experts; ++expert) {
        const share = DIMMEST + (1 - DIMMEST) * Math.sqrt((data.use[layer]?.[expert] ?? 0) / 255);
        const hue = colours[data.tiers[layer]?.[expert]] ?? base;
        const bright = this.moved[layer]?.[expert] ? hue.map((c) => (c + 255) / 2) : hue.map((c, i) => base[i] + (c - base[i]) * share);
        fill(pixels, canvas.width, left(expert), layer * size.height, left(expert + 1) - left(expert) - gap, size.height - gap, bright);
      }
    context.putImageData(image, 0, 0);
    if (this.cell) this.frame(context);
  }

  frame(context) {
    const { size, cell } = this;
    const [r, g, b] = colour("--text");
    context.strokeStyle = `rgb(${r},${g},${b})`;
    context.lineWidth = Math.max(1, size.scale);
    context.strokeRect(cell.expert * size.width + 0.5, cell.layer * size.height + 0.5, size.width - 1, size.height - 1);
  }

  cellAt(x, y) {
    if (!this.data) return null;
    const cell = { expert: Math.floor((x * this.size.scale) / this.size.width), layer: Math.floor((y * this.size.scale) / this.size.height) };
    return cell.expert >= 0 && cell.expert < this.data.experts && cell.layer >= 0 && cell.layer < this.data.layers ? cell : null;
  }

  move(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || !this.data) return;
    event.preventDefault();
    const at = this.cell ?? { expert: 0, layer: 0 };
    const within = (x, count) => Math.max(0, Math.min(count - 1, x));
    this.point(this.cell ? { expert: within(at.expert + step[0], this.data.experts), layer: within(at.layer + step[1], this.data.layers) } : at);
  }

  point(cell) {
    this.cell = cell;
    this.tip.hidden = !cell;
    if (!this.data || !this.size) return;
    this.paint();
    if (!cell) return;
    const { data, size } = this;
    const tier = TIERS[data.tiers[cell.layer]?.[cell.expert]] ?? "nowhere";
    const tokens = data.tokens?.[cell.layer]?.[cell.expert];
    const use = data.use[cell.layer]?.[cell.expert] ?? 0;
    this.tip.textContent = `Layer ${cell.layer + (data.first_layer ?? 0)}, expert ${cell.expert}: ${tier}` +
      `${tokens == null ? "" : `, ${number(tokens)} tokens`}, use ${Math.round(use / 2.55)} %`;
    const x = ((cell.expert + 1) * size.width) / size.scale, y = ((cell.layer + 1) * size.height) / size.scale;
    this.tip.style.left = `${Math.max(0, Math.min(x, this.root.clientWidth - this.tip.offsetWidth))}px`;
    this.tip.style.top = `${y + 4}px`;
  }
}

function fill(pixels, stride, x, y, width, height, [r, g, b]) {
  const value = (255 << 24) | (b << 16) | (g << 8) | r;  // little-endian RGBA
  for (let row = y; row < y + height; ++row) pixels.fill(value, row * stride + x, row * stride + x + width);
}
