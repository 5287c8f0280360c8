// What the box does: /v1/stats as it changes, and the expert map and the plan beside it. A part whose endpoint a server
// does not have is not shown.
import { ApiError, events, get, key, request } from "./api.js";
import { Sparkline, meter, stackedBar } from "./charts.js";
import { button, copyButton, h } from "./dom.js";
import { ExpertMap } from "./expert_map.js";
import { health } from "./health.js";
import { bytes, milliseconds, number, percent, rate, seconds, short } from "./format.js";
import { planText } from "./plan.js";

const EXPERTS_MS = 2000, POLL_MS = 1000, AGAIN_MS = 3000, MOST_RECENT = 12;
const TIER_NAMES = { ram: "RAM", nvme: "NVMe" };
const tierName = (tier) => TIER_NAMES[tier] ?? tier.toUpperCase().replace(/^GPU(\d)/, "GPU $1");

const card = (title, ...children) => h("section", { class: "card", "aria-label": title, hidden: true }, h("h2", {}, title), ...children);
const tile = (name) => {
  const value = h("dd", {}, "–");
  return { root: h("div", {}, h("dt", {}, name), value), value };
};

export class Box {
  constructor(root, model) {
    this.root = root;
    this.model = model;
    this.map = new ExpertMap();
    this.spark = new Sparkline("Answer tokens a second");
    this.tiles = Object.fromEntries(
      ["Answer t/s", "Prompt t/s", "Running", "Waiting", "First token p50 / p95", "Token p50 / p95", "Prefix hits", "Up"].map((name) => [name, tile(name)]));
    this.body = {};
    const part = (name) => (this.body[name] = h("div", {}));
    this.cards = {
      now: card("Now", h("dl", { class: "tiles" }, ...Object.values(this.tiles).map((t) => t.root)), h("div", {}, this.spark.canvas)),
      tiers: card("Memory", part("tiers")),
      kv: card("KV cache and bandwidth", part("kv")),
      experts: card("Experts", this.map.root, part("experts")),
      requests: card("Requests", part("active"), this.recentTable()),
      forecast: card("Predicted and measured", part("forecast")),
      plan: card("Plan", part("plan")),
      connect: card("Connect", part("connect"), part("version")),
    };
    this.note = h("p", { class: "note" }, "Nothing is known of the box yet.");
    root.append(this.note, ...Object.values(this.cards));
    this.missing = new Set();
    document.addEventListener("visibilitychange", () => this.follow());
  }

  visible(shown) {
    this.shown = shown;
    this.follow();
    if (shown) this.redraw();
  }

  start() {
    this.started = true;
    this.missing.clear();
    this.showConnect();
    this.load("version", ({ version }) => this.body.version.replaceChildren(h("p", { class: "note" }, `Thermocline ${version}`)));
    this.load("v1/plan", (plan) => {
      this.reveal("plan");
      this.body.plan.replaceChildren(...planText(plan));
    });
    this.follow();
  }

  lost() {
    this.started = false;
    this.follow();
  }

  redraw() {
    this.spark.draw();
    this.map.draw();
  }

  reveal(name) {
    this.note.hidden = true;
    this.cards[name].hidden = false;
  }

  // A path that is not there is not asked for again until the server was away.
  async load(path, show) {
    if (this.missing.has(path)) return;
    try {
      show(await get(path));
    } catch (error) {
      this.failed(path, error);
    }
  }

  failed(path, error) {
    if (!(error instanceof ApiError)) return;
    if (error.status === 404) this.missing.add(path);
    if (error.status === 401) {
      this.note.hidden = false;
      this.note.replaceChildren("The box view needs the server's key. ", button("Enter it", () => get(path, false).then(() => this.start(), () => null)));
    }
  }

  /** Listens while somebody looks. */
  follow() {
    const wanted = this.shown && this.started && !document.hidden;
    if (wanted === Boolean(this.listening)) return;
    this.listening?.abort();
    this.listening = wanted ? new AbortController() : null;
    if (!wanted) return;
    this.followStats(this.listening.signal);
    this.followExperts(this.listening.signal);
  }

  async followStats(signal) {
    while (!signal.aborted && !this.missing.has("v1/stats")) {
      let wait = AGAIN_MS;
      try {
        const reply = await request("v1/stats?stream=1", { signal }, true);
        if (reply.headers.get("content-type")?.startsWith("text/event-stream"))
          for await (const data of events(reply)) this.show(JSON.parse(data));
        else {
          this.show(await reply.json());
          wait = POLL_MS;
        }
      } catch (error) {
        this.failed("v1/stats", error);
      }
      await pause(wait);
    }
    while (!signal.aborted && this.missing.has("v1/stats")) {
      this.showCounts(health().counts);
      await pause(AGAIN_MS);
    }
  }

  // What /health counts, of a server that tells no more.
  showCounts({ running, waiting, kv_tokens_used, kv_tokens_total } = {}) {
    if (running == null) return;
    this.showNow({ requests: { running, waiting } });
    this.showKv({ kv: { tokens_used: kv_tokens_used, tokens_total: kv_tokens_total } });
  }

  async followExperts(signal) {
    while (!signal.aborted && !this.missing.has("v1/experts")) {
      await this.load("v1/experts", (data) => {
        if (!data.layers) return;
        this.reveal("experts");
        this.map.show(data);
      });
      await pause(EXPERTS_MS);
    }
  }

  show(stats) {
    this.showNow(stats);
    this.showTiers(stats.tiers ?? []);
    this.showExperts(stats.experts);
    this.showKv(stats);
    this.showRequests(stats.requests ?? {});
    this.showForecast(stats.forecast);
  }

  showNow({ tokens, requests = {}, latency = {}, kv = {}, uptime_seconds }) {
    this.reveal("now");
    const set = (name, text) => (this.tiles[name].value.textContent = text);
    const pair = (p) => (p?.p50 == null ? "–" : span(milliseconds(p.p50), milliseconds(p.p95)));
    set("Answer t/s", tokens ? short(tokens.answer_per_second ?? 0) : "–");
    set("Prompt t/s", tokens ? short(tokens.prompt_per_second ?? 0) : "–");
    set("Running", number(requests.running ?? 0));
    set("Waiting", number(requests.waiting ?? 0));
    set("First token p50 / p95", pair(latency.ttft_ms));
    set("Token p50 / p95", pair(latency.tpot_ms));
    set("Prefix hits", kv.hit_rate == null ? "–" : percent(kv.hit_rate));
    set("Up", uptime_seconds == null ? "–" : seconds(uptime_seconds));
    if (tokens) this.spark.add(tokens.answer_per_second ?? 0);
  }

  showTiers(tiers) {
    if (!tiers.length) return;
    this.reveal("tiers");
    const kinds = [...new Set(tiers.flatMap((tier) => tier.parts.map((part) => part.kind)))];
    this.body.tiers.replaceChildren(
      ...tiers.map((tier) => {
        const used = tier.parts.reduce((sum, part) => sum + part.bytes, 0);
        const whole = Math.max(tier.capacity_bytes ?? 0, used, 1);
        const parts = tier.parts.map((part) => ({
          share: part.bytes / whole,
          kind: part.kind,
          title: `${part.kind}: ${bytes(part.bytes)}${part.used_bytes == null ? "" : `, ${bytes(part.used_bytes)} of it used`}`,
          used: part.used_bytes == null || !part.bytes ? null : part.used_bytes / part.bytes,
        }));
        const text = `${bytes(used)} of ${bytes(whole)}`;
        return h("div", { class: "tier" },
          h("div", { class: "line" }, h("b", {}, tierName(tier.tier)), h("span", {}, text)),
          stackedBar(`${tierName(tier.tier)}: ${text}. ${parts.map((p) => p.title).join(". ")}`, parts),
          h("div", { class: "parts" }, ...tier.parts.filter((part) => part.bytes > 0).map((part) => h("span", {}, swatch(part.kind), `${part.kind} ${bytes(part.bytes)}`))));
      }),
      kinds.length ? h("p", { class: "note" }, "Pale: room of a cache that is not used yet.") : null);
  }

  showExperts(experts) {
    if (!experts) return;
    const legend = ["gpu", "ram", "nvme"].map((tier) => h("span", {}, swatch(`tier-${tier}`), { gpu: "GPU", ram: "RAM", nvme: "NVMe" }[tier]));
    const facts = [
      experts.hit_rate == null ? null : `${percent(experts.hit_rate)} of expert calls found on a device`,
      experts.slots_total ? `${number(experts.slots)} of ${number(experts.slots_total)} slots filled, ${number(experts.installs_total ?? 0)} installs` : null,
    ].filter(Boolean);
    this.body.experts.replaceChildren(h("div", { class: "parts" }, ...legend, h("span", {}, "strong: used lately")), facts.length ? h("p", { class: "note" }, facts.join("; ")) : "");
  }

  showKv({ kv, speed }) {
    const rows = [];
    const row = (name, text, share, kind) => rows.push(h("div", { class: "line" }, h("b", {}, name), h("span", {}, text)), meter(`${name}: ${text}`, share, kind));
    if (kv?.tokens_total) row("KV", `${number(kv.tokens_used)} of ${number(kv.tokens_total)} tokens${kv.prefix_cached_tokens == null ? "" : `, ${number(kv.prefix_cached_tokens)} kept of earlier prompts`}`, kv.tokens_used / kv.tokens_total, "kv");
    if (speed?.stream_bytes_per_second) row("Bandwidth", `${rate(speed.read_bytes_per_second)} of the ${rate(speed.stream_bytes_per_second)} roof, ${percent(speed.share ?? 0)}`, speed.share ?? 0);
    else if (speed?.read_bytes_per_second) rows.push(h("div", { class: "line" }, h("b", {}, "Bandwidth"), h("span", {}, `${rate(speed.read_bytes_per_second)}; thermocline calibrate measures the roof`)));
    if (!rows.length) return;
    this.reveal("kv");
    this.body.kv.replaceChildren(...rows);
  }

  showRequests({ active = [], recent = [] }) {
    this.reveal("requests");
    this.body.active.replaceChildren(...active.map((r) => {
      const share = r.phase === "decode" ? 1 : r.prompt_tokens ? (r.cached_tokens ?? 0) / r.prompt_tokens : 0;
      const text = `${r.phase}, ${number(r.prompt_tokens)} prompt (${number(r.cached_tokens ?? 0)} cached), ${number(r.completion_tokens)} answer tokens, ${seconds(r.seconds)}`;
      return h("div", { class: "active" }, h("div", { class: "line" }, h("b", {}, r.path.replace(/^\/v1\//, "")), h("span", {}, text)), meter(`${r.id}: ${text}`, share, r.phase));
    }));
    const cells = (r) => [seconds(r.age_seconds), r.path.replace(/^\/v1\//, ""), r.status === 200 ? r.finish : String(r.status), number(r.prompt_tokens), number(r.cached_tokens), number(r.completion_tokens),
      milliseconds(r.queue_ms), milliseconds(r.ttft_ms), milliseconds(r.tpot_ms), milliseconds(r.total_ms)];
    this.body.recent.replaceChildren(...recent.slice(0, MOST_RECENT).map((r) => h("tr", { title: r.id, class: r.status === 200 ? null : "bad" }, ...cells(r).map((text) => h("td", {}, text)))));
  }

  // Made once: whoever scrolls or stands in it stays there while rows come.
  recentTable() {
    const heads = ["age", "path", "end", "prompt", "cached", "answer", "queued", "first", "a token", "in all"];
    this.body.recent = h("tbody", {});
    return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Recent requests" },
      h("table", { class: "recent" }, h("thead", {}, h("tr", {}, ...heads.map((head) => h("th", { scope: "col" }, head)))), this.body.recent));
  }

  showForecast(forecast) {
    if (!forecast?.steps) return;
    this.reveal("forecast");
    const most = Math.max(...[forecast, ...forecast.phases].flatMap((p) => [p.measured_seconds, p.predicted_seconds]), 1e-9);
    const row = (name, p) => h("div", { class: "pair" }, h("span", {}, name),
      h("div", {}, meter(`${name}: predicted ${seconds(p.predicted_seconds)}`, p.predicted_seconds / most, "predicted"), meter(`${name}: measured ${seconds(p.measured_seconds)}`, p.measured_seconds / most, "measured")),
      h("span", { class: "figure" }, p.predicted_seconds > 0 ? `× ${short(p.measured_seconds / p.predicted_seconds)}` : "–"));
    this.body.forecast.replaceChildren(
      h("p", {}, `${number(forecast.steps)} steps took ${seconds(forecast.measured_seconds)}; predicted were ${seconds(forecast.predicted_seconds)}.`),
      h("div", { class: "parts" }, h("span", {}, swatch("predicted"), "predicted"), h("span", {}, swatch("measured"), "measured"), h("span", {}, "×: measured over predicted")),
      row("all", forecast), ...forecast.phases.map((p) => row(p.phase, p)));
  }

  showConnect() {
    this.reveal("connect");
    const url = new URL("v1", document.baseURI).href;
    const body = JSON.stringify({ model: this.model(), messages: [{ role: "user", content: "Hello" }] }).replaceAll("'", "'\\''");
    const auth = key() ? " -H \"authorization: Bearer $OPENAI_API_KEY\"" : "";
    const curl = `curl ${url}/chat/completions${auth} -H 'content-type: application/json' -d '${body}'`;
    const environment = `export OPENAI_BASE_URL=${url} OPENAI_API_KEY=${key() ? "YOUR_KEY" : "none"}`;
    this.body.connect.replaceChildren(...[["curl", curl], ["OpenAI clients", environment]].map(([name, line]) =>
      h("div", { class: "code" }, h("div", { class: "bar" }, h("span", {}, name), copyButton(() => line)), h("pre", { tabindex: "0" }, h("code", {}, line)))));
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
// Two figures, with one unit where it is the same.
const span = (a, b) => (a.split(" ")[1] === b.split(" ")[1] ? `${a.split(" ")[0]} / ${b}` : `${a} / ${b}`);
const swatch = (kind) => h("i", { class: "swatch", "data-kind": kind });
