"use strict";
// A browser as small as the page needs: elements, a virtual clock, and a fetch that Python answers. It has no parser of
// HTML behind its properties: what would make markup of a text throws, as does what the page's security policy forbids.

const HOST = { requests: [], timers: new Map(), now: 0, nextTimer: 1, streams: new Map(), storage: new Map() };

class Text {
  constructor(data) { this.data = data; this.parentNode = null; }
  get textContent() { return this.data; }
}

class ClassList {
  constructor(element) { this.element = element; }
  names() { return this.element.className.split(/\s+/).filter(Boolean); }
  contains(name) { return this.names().includes(name); }
  add(name) { if (!this.contains(name)) this.element.className = [...this.names(), name].join(" "); }
  remove(name) { this.element.className = this.names().filter((other) => other !== name).join(" "); }
  toggle(name, force) {
    const on = force === undefined ? !this.contains(name) : Boolean(force);
    if (on) this.add(name); else this.remove(name);
    return on;
  }
}

class Style {
  setProperty(name, value) { this[name] = value; }
}

class Element {
  constructor(tag) {
    this.tagName = tag.toUpperCase();
    this.childNodes = [];
    this.attributes = {};
    this.className = "";
    this.classList = new ClassList(this);
    this.style = new Style();
    this.dataset = {};
    this.listeners = {};
    this.parentNode = null;
    this.value = "";
    this.checked = false;
  }
  set innerHTML(_) { throw new Error("innerHTML makes HTML of text"); }
  set outerHTML(_) { throw new Error("outerHTML makes HTML of text"); }
  insertAdjacentHTML() { throw new Error("insertAdjacentHTML makes HTML of text"); }
  get children() { return this.childNodes.filter((node) => node instanceof Element); }
  get childElementCount() { return this.children.length; }
  get lastElementChild() { return this.children.at(-1) ?? null; }
  get textContent() { return this.childNodes.map((node) => node.textContent).join(""); }
  set textContent(text) { this.replaceChildren(...(String(text) === "" ? [] : [String(text)])); }
  adopt(nodes) {
    return nodes.map((node) => {
      const own = node instanceof Element || node instanceof Text ? node : new Text(String(node));
      if (own.parentNode) own.parentNode.childNodes = own.parentNode.childNodes.filter((other) => other !== own);
      own.parentNode = this;
      return own;
    });
  }
  append(...nodes) { this.childNodes.push(...this.adopt(nodes)); }
  prepend(...nodes) { this.childNodes.unshift(...this.adopt(nodes)); }
  replaceChildren(...nodes) {
    for (const node of this.childNodes) node.parentNode = null;
    this.childNodes = [];
    this.append(...nodes);
  }
  remove() {
    if (this.parentNode) this.parentNode.childNodes = this.parentNode.childNodes.filter((node) => node !== this);
    this.parentNode = null;
  }
  setAttribute(name, value) {
    if (/^(on|style$|href$|src|srcdoc$|action$|formaction$)/i.test(name)) throw new Error(`the page sets ${name}`);
    this.attributes[name] = String(value);
  }
  getAttribute(name) { return this.attributes[name] ?? null; }
  addEventListener(kind, listener) { (this.listeners[kind] ??= []).push(listener); }
  dispatch(kind) { for (const listener of this.listeners[kind] ?? []) listener({ target: this, preventDefault() {} }); }
  focus() { document.activeElement = this; }
}

const document = {
  activeElement: null,
  root: null,
  createElement: (tag) => new Element(tag),
  getElementById(id) {
    const search = (element) => {
      if (element.attributes.id === id) return element;
      for (const child of element.children) { const found = search(child); if (found) return found; }
      return null;
    };
    return search(document.root);
  },
  write() { throw new Error("document.write makes HTML of text"); },
};

const sessionStorage = {
  getItem: (name) => HOST.storage.get(name) ?? null,
  setItem: (name, value) => { HOST.storage.set(name, String(value)); },
};

// ---- time
function timer(run, delay, every) {
  const id = HOST.nextTimer++;
  HOST.timers.set(id, { run, at: HOST.now + Math.max(delay || 0, 0), every });
  return id;
}
const setTimeout = (run, delay) => timer(run, delay, 0);
const setInterval = (run, delay) => timer(run, delay, Math.max(delay, 1));
const clearTimeout = (id) => { HOST.timers.delete(id); };
const clearInterval = clearTimeout;

// ---- network
class AbortController {
  constructor() {
    this.signal = { aborted: false, listeners: [] };
  }
  abort() {
    if (this.signal.aborted) return;
    this.signal.aborted = true;
    for (const listener of this.signal.listeners) listener();
  }
}
const AbortSignal = {
  timeout(ms) {
    const aborter = new AbortController();
    setTimeout(() => aborter.abort(), ms);
    return aborter.signal;
  },
};
class TextDecoderStream {}
class Stream {
  constructor() { this.chunks = []; this.waiting = null; this.ended = null; }
  pipeThrough(transform) {
    if (!(transform instanceof TextDecoderStream)) throw new Error("bytes are read without a decoder");
    return this;
  }
  getReader() { return this; }
  read() {
    return new Promise((resolve, reject) => { this.waiting = { resolve, reject }; this.settle(); });
  }
  settle() {
    if (!this.waiting) return;
    const { resolve, reject } = this.waiting;
    if (this.chunks.length) resolve({ value: this.chunks.shift(), done: false });
    else if (this.ended === "closed") resolve({ value: undefined, done: true });
    else if (this.ended) reject(new TypeError(this.ended));
    else return;
    this.waiting = null;
  }
  end(how) { this.ended ??= how; this.settle(); }
}
function fetch(path, options = {}) {
  return new Promise((resolve, reject) => {
    const stream = new Stream(), id = HOST.requests.length;
    const signal = options.signal;
    if (signal) signal.listeners.push(() => { stream.end("aborted"); reject(new TypeError("aborted")); });
    HOST.streams.set(id, { resolve, reject, stream });
    HOST.requests.push({ id, path, method: options.method ?? "GET", headers: options.headers ?? {}, body: options.body ?? null, answered: false });
  });
}

// ---- what Python calls
function build(node) {
  if (typeof node === "string") return new Text(node);
  const element = new Element(node.tag);
  for (const [name, value] of Object.entries(node.attributes)) {
    element.attributes[name] = value;
    if (name === "class") element.className = value;
  }
  element.append(...node.children.map(build));
  return element;
}
const host = {
  load(text) { document.root = build(JSON.parse(text)); },
  requests: () => JSON.stringify(HOST.requests.filter((request) => !request.answered)),
  answer(id, status, text) {
    const { resolve, stream } = HOST.streams.get(id);
    HOST.requests[id].answered = true;
    resolve({ ok: status < 300, status, body: stream, json: async () => JSON.parse(text) });
  },
  fail(id) {
    HOST.requests[id].answered = true;
    HOST.streams.get(id).reject(new TypeError("Failed to fetch"));
  },
  push(id, text) { const { stream } = HOST.streams.get(id); stream.chunks.push(text); stream.settle(); },
  end(id, how) { HOST.streams.get(id).stream.end(how); },
  // Runs the next timer that is due by `until`; false where there is none.
  tick(until) {
    const due = [...HOST.timers].filter(([, one]) => one.at <= until).sort((a, b) => a[1].at - b[1].at || a[0] - b[0])[0];
    if (!due) { HOST.now = until; return false; }
    const [id, one] = due;
    HOST.now = one.at;
    if (one.every) one.at += one.every; else HOST.timers.delete(id);
    one.run();
    return true;
  },
  now: () => HOST.now,
  click(name) {
    const search = (element) => {
      if (element.tagName === "BUTTON" && element.attributes["aria-label"] === name) return element;
      for (const child of element.children) { const found = search(child); if (found) return found; }
      return null;
    };
    const button = search(document.root);
    if (!button) throw new Error(`no button ${name}`);
    button.dispatch("click");
  },
  check(id, on) { const box = document.getElementById(id); box.checked = on; box.dispatch("change"); },
  submit(id, field, value) { document.getElementById(field).value = value; document.getElementById(id).dispatch("submit"); },
  // An element as data: what is text, what is markup.
  dump(id) {
    const plain = (node) => node instanceof Text ? node.data : {
      tag: node.tagName.toLowerCase(), class: node.className, attributes: node.attributes, title: node.title ?? "",
      style: { ...node.style }, children: node.childNodes.map(plain),
    };
    const element = document.getElementById(id);
    return element ? JSON.stringify(plain(element)) : "null";
  },
};
