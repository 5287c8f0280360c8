// Elements without markup: whatever is put in is text.

export const byId = (id) => document.getElementById(id);

/** h("button", {class: "x", onclick: f, "aria-label": "y"}, "text", child, null) */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

export function button(text, onclick, props = {}) {
  return h("button", { type: "button", onclick, ...props }, text);
}

/** A button that copies what `text()` gives and says so for a moment. */
export function copyButton(text, label = "Copy") {
  const element = button(label, async () => {
    element.textContent = (await copy(text())) ? "Copied" : "Not copied";
    setTimeout(() => (element.textContent = label), 1500);
  });
  return element;
}

// The clipboard's own interface exists only on https and localhost; a box in the house is often neither.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

/** For those who hear the page. */
export function say(text) {
  byId("spoken").textContent = text;
}

/** A custom property as canvas code takes it; light-dark() is resolved on the way. */
export function colour(name) {
  const probe = h("span", { hidden: true });
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const [r, g, b] = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
  probe.remove();
  return [r, g, b];
}

/** At most every `ms`, and for a fifth of the time: a call that takes long is made more seldom. */
export function throttle(call, ms) {
  let next = 0, timer = 0;
  return () => {
    timer ||= setTimeout(() => {
      timer = 0;
      const began = performance.now();
      call();
      const end = performance.now();
      next = end + Math.max(ms, 4 * (end - began));
    }, Math.max(0, next - performance.now()));
  };
}
