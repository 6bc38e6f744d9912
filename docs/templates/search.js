// Search over notebooks, pages and reference. The index is a script of the site, loaded when the field is first used:
// that works from a disk, where a page may not fetch files.
(() => {
  const root = document.currentScript.dataset.root;
  const field = document.getElementById("search");
  const list = document.getElementById("found");
  const menu = document.querySelector("details.menu");
  const contents = document.querySelector("details.contents");
  if (menu && matchMedia("(max-width: 55rem)").matches) menu.open = false;
  if (contents && matchMedia("(min-width: 85rem)").matches) contents.open = true;
  let index = null, loading = false, chosen = -1;

  window.fedlabSearch = (entries) => {
    index = entries.map((e) => ({...e, head: `${e.h || e.t}`.toLowerCase(), title: e.t.toLowerCase(), text: e.x.toLowerCase()}));
    show();
  };

  function load() {
    if (loading) return;
    loading = true;
    const script = document.createElement("script");
    script.src = root + "search-index.js";
    document.head.append(script);
  }

  // How well an entry answers one word; 0 if it lacks it. The start of a word counts more than its middle.
  function points(entry, word) {
    if (entry.head === word) return 60;
    const start = new RegExp(`(^|[^\\p{L}\\p{N}])${word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}`, "u");
    if (start.test(entry.head)) return 30;
    if (entry.head.includes(word)) return 18;
    if (start.test(entry.title)) return 10;
    if (!entry.text.includes(word)) return 0;
    return (start.test(entry.text) ? 3 : 1) + Math.min(4, entry.text.split(word).length - 1);
  }

  function find(words) {
    return index.map((entry) => {
      const each = words.map((word) => points(entry, word));
      return {entry, score: each.includes(0) ? 0 : each.reduce((a, b) => a + b, 0)};
    }).filter((one) => one.score).sort((a, b) => b.score - a.score).slice(0, 20).map((one) => one.entry);
  }

  // The text around the first match, with every word marked; built of nodes, so that nothing in it is read as HTML.
  function excerpt(entry, words) {
    const first = Math.max(0, Math.min(...words.map((w) => entry.text.indexOf(w)).filter((at) => at >= 0), Infinity));
    const from = Number.isFinite(first) ? Math.max(0, first - 60) : 0;
    const piece = (from ? "…" : "") + entry.x.slice(from, from + 180) + (entry.x.length > from + 180 ? "…" : "");
    const out = document.createElement("small");
    const parts = new RegExp(`(${words.map((w) => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "giu");
    piece.split(parts).forEach((text, k) => {
      const node = k % 2 ? document.createElement("mark") : document.createTextNode(text);
      if (k % 2) node.textContent = text;
      out.append(node);
    });
    return out;
  }

  function show() {
    const words = field.value.toLowerCase().split(/[\s]+/).filter((word) => word.length > 1);
    list.hidden = !words.length;
    chosen = -1;
    list.replaceChildren();
    if (!words.length) return;
    if (!index) { load(); return; }
    const found = find(words);
    for (const entry of found) {
      const item = document.createElement("li"), link = document.createElement("a"), name = document.createElement("b");
      const kind = document.createElement("span");
      link.href = root + entry.u;
      name.textContent = entry.h || entry.t;
      kind.textContent = entry.h ? `${entry.k} · ${entry.t}` : entry.k;
      link.append(name, kind, excerpt(entry, words));
      item.append(link);
      list.append(item);
    }
    if (!found.length) list.append(Object.assign(document.createElement("li"), {textContent: "Nothing found.", className: "none"}));
  }

  function choose(step) {
    const links = [...list.querySelectorAll("a")];
    if (!links.length) return;
    chosen = (chosen + step + links.length) % links.length;
    links.forEach((link, k) => link.classList.toggle("chosen", k === chosen));
    links[chosen].scrollIntoView({block: "nearest"});
  }

  field.addEventListener("focus", load);
  field.addEventListener("input", show);
  field.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); choose(event.key === "ArrowDown" ? 1 : -1); }
    if (event.key === "Enter") (list.querySelectorAll("a")[Math.max(0, chosen)] || {click() {}}).click();
    if (event.key === "Escape") { field.value = ""; show(); field.blur(); }
  });
  list.addEventListener("click", () => { list.hidden = true; });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select, [contenteditable]");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) { event.preventDefault(); field.focus(); }
  });
})();
