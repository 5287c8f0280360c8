// GET /v1/plan in words: what limits this box, and what would help. The same data as `thermocline plan --json`.
import { h } from "./dom.js";
import { bytes, number, seconds, short } from "./format.js";

function sentence(plan) {
  if (!plan.fits) return `It does not fit: ${plan.refusal}`;
  const alone = plan.decode?.find((d) => d.fits);
  const many = plan.decode?.filter((d) => d.fits).at(-1);
  const parts = [];
  if (alone) parts.push(`One conversation gets ${short(alone.tokens_per_second)} tokens a second, limited by ${alone.bottleneck}`);
  if (many && many !== alone) parts.push(`${many.batch} together get ${short(many.tokens_per_second)}, limited by ${many.bottleneck}`);
  if (plan.prefill?.first_token_seconds)
    parts.push(`a prompt of ${number(plan.context)} tokens takes ${seconds(plan.prefill.first_token_seconds)}, limited by ${plan.prefill.bottleneck}`);
  return `${parts.join("; ")}.`;
}

const change = (percent) => `${percent >= 0 ? "+" : "−"}${short(Math.abs(percent))} %`;

export function planText(plan) {
  const memory = plan.memory ?? [];
  const helps = (plan.what_if ?? []).filter((w) => w.fits && Math.max(w.decode_percent, w.prefill_percent) >= 1);
  return [
    h("p", { class: "sentence" }, sentence(plan)),
    memory.length
      ? h("details", {}, h("summary", {}, "Bytes"),
        h("table", {}, h("tbody", {}, ...memory.map((m) => h("tr", {}, h("td", {}, m.tier), h("td", {}, m.owner), h("td", {}, bytes(m.bytes)))))))
      : "",
    helps.length
      ? h("details", {}, h("summary", {}, "What would help"),
        h("table", {}, h("thead", {}, h("tr", {}, ...["change", "decode", "prefill"].map((name) => h("th", { scope: "col" }, name)))),
          h("tbody", {}, ...helps.map((w) => h("tr", {}, h("td", {}, w.change), h("td", {}, change(w.decode_percent)), h("td", {}, change(w.prefill_percent)))))))
      : "",
  ];
}
