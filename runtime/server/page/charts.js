// The few drawings of the box view: a line over time on a canvas, and bars of elements.
import { colour, h } from "./dom.js";

const css = ([r, g, b], alpha = 1) => `rgba(${r},${g},${b},${alpha})`;

/** The canvas in device pixels, its context in CSS pixels. */
export function fitCanvas(canvas, width, height) {
  const scale = devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  return context;
}

/** The last `SECONDS` of a number. */
export class Sparkline {
  static SECONDS = 120;

  constructor(label, height = 56) {
    this.points = [];
    this.height = height;
    this.canvas = h("canvas", { class: "spark", role: "img", "aria-label": label });
    this.label = label;
  }

  add(value) {
    const now = performance.now() / 1000;
    this.points.push({ at: now, value });
    while (this.points[0].at < now - Sparkline.SECONDS) this.points.shift();
    this.draw();
  }

  draw() {
    const width = this.canvas.parentElement?.clientWidth ?? 0;
    if (!width || !this.points.length) return;
    const c = fitCanvas(this.canvas, width, this.height);
    const most = Math.max(1, ...this.points.map((p) => p.value));
    const now = this.points.at(-1).at;
    const x = (p) => width - 4 - ((now - p.at) / Sparkline.SECONDS) * (width - 8);
    const y = (p) => this.height - 3 - (p.value / most) * (this.height - 18);
    const line = colour("--accent");
    c.beginPath();
    this.points.forEach((p, i) => (i ? c.lineTo(x(p), y(p)) : c.moveTo(x(p), y(p))));
    c.strokeStyle = css(line);
    c.lineWidth = 1.5;
    c.lineJoin = "round";
    c.stroke();
    c.lineTo(x(this.points.at(-1)), this.height - 2);
    c.lineTo(x(this.points[0]), this.height - 2);
    c.fillStyle = css(line, 0.15);
    c.fill();
    c.fillStyle = css(colour("--faint"));
    c.font = "11px system-ui, sans-serif";
    c.fillText(`most in ${Sparkline.SECONDS / 60} min: ${most.toLocaleString("en", { maximumFractionDigits: 1 })}`, 4, 11);
    this.canvas.setAttribute("aria-label", `${this.label}: now ${this.points.at(-1).value.toFixed(1)}, at most ${most.toFixed(1)}`);
  }
}

/** Parts of a whole: [{ share, kind, title, used }], `used` the share of the part that is full. */
export function stackedBar(label, parts) {
  return h("div", { class: "bar-track", role: "img", "aria-label": label },
    ...parts.filter((part) => part.share > 0).map((part) => {
      const piece = h("span", { class: "piece", "data-kind": part.kind, title: part.title });
      piece.style.width = `${100 * Math.min(1, part.share)}%`;
      if (part.used != null) {
        const full = h("span", { class: "full" });
        full.style.width = `${100 * Math.min(1, part.used)}%`;
        piece.classList.add("cache");
        piece.append(full);
      }
      return piece;
    }));
}

export const meter = (label, share, kind = "accent") => stackedBar(label, [{ share, kind, title: label }]);
