// What the browser keeps: settings in localStorage, conversations in IndexedDB. Where it keeps nothing (a private
// window), both last as long as the page.

const memory = new Map();

export function setting(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(`thermocline.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function keepSetting(name, value) {
  try {
    localStorage.setItem(`thermocline.${name}`, JSON.stringify(value));
  } catch {
    /* lasts as long as the page */
  }
}

const promised = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

let opened;
function database() {
  opened ??= (async () => {
    const request = indexedDB.open("thermocline", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    return promised(request);
  })().catch(() => null);
  return opened;
}

async function inStore(mode, action) {
  const db = await database();
  return db ? promised(action(db.transaction("conversations", mode).objectStore("conversations"))) : null;
}

/** All of them, the latest first. */
export async function conversations() {
  const kept = (await inStore("readonly", (store) => store.getAll())) ?? [...memory.values()];
  return kept.sort((a, b) => b.changed - a.changed);
}

export async function keep(conversation) {
  memory.set(conversation.id, conversation);
  await inStore("readwrite", (store) => store.put(conversation)).catch(() => null);
}

export async function forget(id) {
  memory.delete(id);
  await inStore("readwrite", (store) => store.delete(id));
}
