// The list of conversations: choose, rename, export, delete.
import { button, byId, h } from "./dom.js";

/** `actions`: choose(c), rename(c, title), remove(c), current(). */
export class Sidebar {
  constructor(actions) {
    this.actions = actions;
    this.list = byId("conversations");
  }

  show(conversations) {
    this.list.replaceChildren(...conversations.map((c) => this.row(c)));
  }

  row(conversation) {
    const { choose, rename, current } = this.actions;
    const title = conversation.title || "Untitled";
    const open = button(title, () => choose(conversation), { class: "title", title, "aria-current": conversation.id === current()?.id ? "true" : null });
    const menu = h("details", { class: "menu" },
      h("summary", { "aria-label": `More about ${title}`, role: "button" }, "⋯"),
      h("div", { class: "tools" },
        button("Rename", () => edit()),
        button("Export", () => download(conversation)),
        this.deleteButton(conversation)));
    const row = h("li", {}, open, menu);
    const edit = () => {
      const input = h("input", { "aria-label": "Title", value: title, maxlength: 120 });
      const back = (save) => {
        if (save && input.value.trim()) rename(conversation, input.value.trim());
        else row.replaceChildren(open, menu);
      };
      input.addEventListener("keydown", (event) => {
        if (event.key === "Escape") event.stopPropagation();
        if (event.key === "Enter" || event.key === "Escape") back(event.key === "Enter");
      });
      row.replaceChildren(input, button("Keep", () => back(true)));
      input.select();
      input.focus();
    };
    return row;
  }

  // Asks once more on the same place.
  deleteButton(conversation) {
    let sure = false;
    const element = button("Delete", () => {
      if (sure) return this.actions.remove(conversation);
      sure = true;
      element.textContent = "Really delete";
      element.classList.add("danger");
    });
    return element;
  }
}

function download(conversation) {
  const file = new Blob([JSON.stringify(conversation, null, 2)], { type: "application/json" });
  const address = URL.createObjectURL(file);
  const name = (conversation.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  h("a", { href: address, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
