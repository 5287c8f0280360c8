// Starts the page: theme, views, conversations, and what the server is.
import { get, onKey } from "./api.js";
import { Box } from "./box.js";
import { Chat } from "./chat.js";
import { byId, say } from "./dom.js";
import { onHealth, watchHealth } from "./health.js";
import { openSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { conversations, forget, keep, keepSetting, setting } from "./store.js";

let list = [];
let model = "";

// --- theme: the system's, or one that was chosen ---

const THEMES = ["auto", "light", "dark"];
function showTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = { auto: "◐", light: "☀", dark: "☾" }[theme];
  byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
  byId("theme").title = `Theme: ${theme}`;
}
function startTheme() {
  let theme = setting("theme", "auto");
  showTheme(theme);
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    keepSetting("theme", theme);
    showTheme(theme);
    box.redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => box.redraw());
}

// --- views: tabs on narrow screens, side by side on wide ones ---

const wide = matchMedia("(min-width: 1180px)");
let view = "chat";
function showView(name = view) {
  view = name;
  for (const id of ["chat", "box"]) {
    byId(id).hidden = !wide.matches && id !== view;
    const tab = byId(`tab-${id}`);
    tab.setAttribute("aria-selected", String(id === view));
    tab.tabIndex = id === view ? 0 : -1;
    byId(id).setAttribute("role", wide.matches ? "region" : "tabpanel");
  }
  box.visible(!byId("box").hidden);
}
function startViews() {
  for (const id of ["chat", "box"]) {
    byId(`tab-${id}`).addEventListener("click", () => showView(id));
    byId(`tab-${id}`).addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      const other = id === "chat" ? "box" : "chat";
      showView(other);
      byId(`tab-${other}`).focus();
    });
  }
  wide.addEventListener("change", () => showView());
  byId("sidebar").addEventListener("keydown", (event) => event.key === "Escape" && document.body.classList.contains("sidebar") && (openSidebar(false), byId("menu").focus()));
  byId("menu").addEventListener("click", () => openSidebar(!document.body.classList.contains("sidebar")));
}
function openSidebar(open) {
  document.body.classList.toggle("sidebar", open);
  byId("menu").setAttribute("aria-expanded", String(open));
  if (open) byId("new-chat").focus();
}

// --- conversations ---

function choose(conversation) {
  chat.show(conversation);
  sidebar.show(list);
  openSidebar(false);
  showView("chat");
}
function newChat() {
  choose({ id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", created: Date.now(), changed: Date.now(), messages: [] });
  if (matchMedia("(pointer: fine)").matches) byId("prompt").focus();  // on a phone a keyboard would cover the page
}

const box = new Box(byId("box"), () => model);
const chat = new Chat({
  model: () => model,
  changed(conversation) {
    list = [conversation, ...list.filter((c) => c.id !== conversation.id)];
    sidebar.show(list);
  },
});
const sidebar = new Sidebar({
  choose,
  current: () => chat.conversation,
  rename(conversation, title) {
    conversation.title = title;
    keep(conversation);
    sidebar.show(list);
  },
  async remove(conversation) {
    chat.remove(conversation.id);
    await forget(conversation.id);
    list = list.filter((c) => c.id !== conversation.id);
    say("Deleted");
    if (chat.conversation.id === conversation.id) newChat();
    else sidebar.show(list);
  },
});

// The name of the model is what needs the key first: with it the reader is asked on opening the page.
async function learnModel() {
  try {
    model = (await get("v1/models")).data[0].id;
    byId("model").textContent = model;
    document.title = `${model} · Thermocline`;
    box.start();
  } catch {
    /* not yet: asked again when /health changes or there is a key */
  }
}

startTheme();
startViews();
openSettings();
byId("new-chat").addEventListener("click", newChat);
onKey(() => model || learnModel());
onHealth((state) => (state.name === "ready" ? learnModel() : box.lost()));
newChat();
showView();
watchHealth();
list = await conversations();
sidebar.show(list);
