// Markdown as DOM nodes. marked reads it into tokens; each becomes an element with text in it. Markup is never parsed:
// HTML in an answer is shown as the text it is, and a link leads to the web or to mail, or is no link.
import "./marked.js";
import { copyButton, h } from "./dom.js";

const { lexer, setOptions } = globalThis.marked;
setOptions({ mangle: false });  // mail addresses as they are
const SCHEMES = ["http:", "https:", "mailto:"];
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'" };

// marked escapes the text of its tokens for those who write HTML.
const plain = (text) => text.replace(/&(?:amp|lt|gt|quot|#39);/g, (entity) => ENTITIES[entity]);

function safeAddress(href) {
  try {
    const url = new URL(href);
    return SCHEMES.includes(url.protocol) ? url.href : null;
  } catch {
    return null;  // a path of this server, or nonsense
  }
}

function link(href, content) {
  const address = safeAddress(plain(href));
  if (!address) return h("span", {}, ...content);
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...content);
}

export function codeBlock(text, language = "") {
  return h("div", { class: "code" },
    h("div", { class: "bar" }, h("span", {}, language), copyButton(() => text)),
    h("pre", { tabindex: "0" }, h("code", {}, text)));
}

function table(token) {
  const cells = (tag, row) => row.map((cell, i) => h(tag, { class: token.align[i] && `align-${token.align[i]}` }, ...nodes(cell.tokens)));
  return h("div", { class: "scroll", tabindex: "0" },
    h("table", {},
      h("thead", {}, h("tr", {}, ...cells("th", token.header))),
      h("tbody", {}, ...token.rows.map((row) => h("tr", {}, ...cells("td", row))))));
}

function item(token) {
  const box = token.task ? [token.checked ? "☑ " : "☐ "] : [];
  return h("li", { class: token.task && "task" }, ...box, ...nodes(token.tokens));
}

const RENDER = {
  space: () => null,
  def: () => null,
  hr: () => h("hr"),
  br: () => h("br"),
  code: (t) => codeBlock(t.text, t.lang ?? ""),  // the one text that is not escaped
  heading: (t) => h(`h${Math.min(6, t.depth + 2)}`, {}, ...nodes(t.tokens)),
  paragraph: (t) => h("p", {}, ...nodes(t.tokens)),
  blockquote: (t) => h("blockquote", {}, ...nodes(t.tokens)),
  list: (t) => h(t.ordered ? "ol" : "ul", { start: t.ordered && t.start !== 1 ? t.start : null }, ...t.items.map(item)),
  table,
  strong: (t) => h("strong", {}, ...nodes(t.tokens)),
  em: (t) => h("em", {}, ...nodes(t.tokens)),
  del: (t) => h("del", {}, ...nodes(t.tokens)),
  codespan: (t) => h("code", {}, plain(t.text)),
  link: (t) => link(t.href, nodes(t.tokens)),
  image: (t) => link(t.href, [plain(t.text) || t.href]),  // nothing is loaded from elsewhere
  html: (t) => h("span", { class: "raw" }, t.raw),
  escape: (t) => document.createTextNode(plain(t.text)),
  text: (t) => (t.tokens ? h("span", {}, ...nodes(t.tokens)) : document.createTextNode(plain(t.text))),
};

function node(token) {
  return (RENDER[token.type] ?? ((t) => document.createTextNode(t.raw)))(token);
}
const nodes = (tokens) => (tokens ?? []).map(node).filter((n) => n);

/** An answer that grows: blocks that did not change keep their elements, and with them a selection in them. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.blocks = [];
    this.definitions = "";
  }

  update(text) {
    if (text === this.text) return;
    this.text = text;
    try {
      const tokens = lexer(text);
      const definitions = JSON.stringify(tokens.links);
      let same = 0;
      if (definitions === this.definitions)
        while (same < tokens.length && this.blocks[same]?.raw === tokens[same].raw) ++same;
      this.definitions = definitions;
      for (const block of this.blocks.splice(same)) block.node?.remove();
      for (const token of tokens.slice(same)) {
        const block = { raw: token.raw, node: node(token) };
        if (block.node) this.root.append(block.node);
        this.blocks.push(block);
      }
    } catch {  // nested beyond what the parser's stack holds
      this.blocks = [];
      this.root.replaceChildren(h("pre", {}, text));
    }
  }
}
