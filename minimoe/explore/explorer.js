// The routing explorer: one ES module, run by anywidget in JupyterLab and inlined on a page that has no kernel.
// Every string that comes from the text is set as text, never as HTML.
const KEYS = { "data-lm-suppress-shortcuts": "true" };    // else JupyterLab takes the arrow keys of the focused element

function h(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const span = (name, ...children) => h("span", { class: name }, ...children);
const button = (name, attributes, ...children) =>
  h("button", { type: "button", class: name, ...KEYS, ...attributes }, ...children);
const percent = share => (100 * share).toFixed(1) + "%";
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const largest = rows => rows.reduce((most, row) => row.reduce((a, b) => Math.max(a, b), most), 0);

// color by expert modulo 8, pattern by expert div 8, strength (0 to 1) by weight: explorer.css mixes them
function paint(node, expert, strength) {
  node.style.setProperty("--e", `var(--mm-c${expert % 8})`);
  node.style.setProperty("--w", strength);
  node.dataset.pattern = Math.floor(expert / 8) % 8;
  return node;
}
const badge = expert => paint(span("mm-badge", expert), expert, 1);

// one Tab stop for a group, arrow keys inside; `go(key, at)` gives the next place, undefined for a key that is not ours
function rove(box, items, go, moved) {
  let at = 0;
  const set = i => { items[at].tabIndex = -1; at = i; items[at].tabIndex = 0; };
  items.forEach((item, i) => { item.tabIndex = i ? -1 : 0; });
  box.addEventListener("focusin", event => { const i = items.indexOf(event.target); if (i >= 0) set(i); });
  box.addEventListener("keydown", event => {
    const next = event.ctrlKey || event.metaKey || event.altKey ? undefined : go(event.key, at);
    if (next === undefined) return;
    event.preventDefault(); event.stopPropagation();
    set(Math.max(0, Math.min(items.length - 1, next)));
    items[at].focus();
    if (moved) moved(at);
  });
  return set;
}
const along = n => (key, at) =>
  ({ ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: n - 1 })[key];

// bars by expert: the load of a layer (as buttons), the probabilities of a token
function columns(values, top, words, asButtons) {
  const marks = values.map((value, e) => {
    const bar = span("mm-bar");
    bar.style.height = 100 * Math.min(1, value / top) + "%";
    const inside = [span("mm-well", bar), span("mm-number", e), span("mm-value", words(value))];
    return paint(asButtons ? button("mm-column", {}, ...inside) : span("mm-column", ...inside), e, 1);
  });
  const box = h("div", { class: "mm-columns" + (values.length > 16 ? " mm-many" : "") }, ...marks);
  box.style.setProperty("--even", 1 / values.length / top);
  return [box, marks];
}

function body(item, startLayer) {
  const trace = item.trace, labels = item.labels, E = trace.n_experts, T = trace.tokens.length;
  const taker = trace.router === "expert_choice";               // experts choose tokens: a token may have none
  const highest = Math.max(2 / E, largest(trace.layers.map(l => l.load)));       // one scale, so that layers compare
  const heaviest = largest(trace.layers.flatMap(l => l.weights)) || 1;           // has the deepest color
  const strength = (l, t, k) => l.kept[t][k] ? l.weights[t][k] / heaviest : 0;      // a dropped choice stays pale
  let layer = Math.max(0, trace.layers.findIndex(l => l.index === startLayer)), token = null, expert = null;
  let L = trace.layers[layer], picks = [];                      // picks[token]: its choices in this layer, best first
  const took = (t, e) => picks[t].some(c => c.e === e && c.kept);
  const said = t => (trace.parts[t] ? "" : trace.tokens[t].trim()) || labels[t].replace(/↵/g, " newline ")
    .replace(/⇥/g, " tab ").replace(/·+/g, dots => ` ${plural(dots.length, "space")} `).trim();

  // --- layers --------------------------------------------------------------------------------------------------------
  const radios = trace.layers.map(l => button("mm-layer", { role: "radio" }, l.index));
  const layers = h("div", { class: "mm-layers", role: "radiogroup", "aria-label": "Layer" }, ...radios);
  const markLayer = rove(layers, radios, along(radios.length), i => setLayer(i));
  radios.forEach((radio, i) => radio.addEventListener("click", () => setLayer(i)));

  // --- the text ------------------------------------------------------------------------------------------------------
  const chips = labels.map((label, t) =>
    h("span", { class: "mm-token", role: "option", "data-token": t, "aria-selected": "false", ...KEYS },
      span("mm-text", label), span("mm-band")));
  const flow = h("div", { class: "mm-flow", role: "listbox", "aria-label": "Tokens of the text",
    "aria-orientation": "horizontal" });
  trace.tokens.forEach((text, t) => {
    const lines = text.split("\n"), indent = lines[lines.length - 1].replace(/\t/g, "    ");
    flow.append(chips[t]);
    if (lines.length === 1) return;
    flow.append(h("span", { class: "mm-break" + (lines.length > 2 ? " mm-gap" : ""), "aria-hidden": "true" }));
    if (!indent.trim()) flow.append(h("span", { class: "mm-indent", "aria-hidden": "true" }, indent));
  });
  function upDown(at, sign) {                                   // the nearest token of the next line, by its middle
    const here = chips[at].getBoundingClientRect(), middle = here.left + here.width / 2;
    let best = null;
    for (let t = at + sign; t >= 0 && t < T; t += sign) {
      const box = chips[t].getBoundingClientRect(), off = Math.abs(box.left + box.width / 2 - middle);
      if (sign * (box.top - here.top) < 4) continue;
      if (best && Math.abs(box.top - best.top) > 4) break;
      if (!best || off < best.off) best = { t, off, top: box.top };
    }
    return best ? best.t : at;
  }
  const markToken = rove(flow, chips, (key, at) =>
    key === "ArrowDown" ? upDown(at, 1) : key === "ArrowUp" ? upDown(at, -1) : along(T)(key, at));
  const tokenOf = event => { const chip = event.target.closest("[data-token]"); return chip && +chip.dataset.token; };
  flow.addEventListener("focusin", event => pin(tokenOf(event)));
  flow.addEventListener("click", event => { const t = tokenOf(event); if (t != null) chips[t].focus(); });
  flow.addEventListener("mouseover", event => { const t = tokenOf(event); if (t != null) show(t); });
  flow.addEventListener("mouseleave", () => show(token));

  // --- the panel of one token ----------------------------------------------------------------------------------------
  const panel = h("div", { class: "mm-panel" });
  const spoken = h("p", { class: "mm-hidden", role: "status", "aria-live": "polite" });
  function facts(t) {
    const probs = L.probs[t], lost = picks[t].filter(c => !c.kept).map(c => c.e), lines = [];
    const others = probs.map((p, e) => [p, e]).filter(([, e]) => !picks[t].some(c => c.e === e));
    const next = others.sort((a, b) => b[0] - a[0])[0];
    if (next && picks[t].length) {
      const least = Math.min(...picks[t].map(c => probs[c.e]));
      lines.push(["Margin", `${(least - next[0]).toFixed(3)} over expert ${next[1]}`]);
    }
    lines.push(["Entropy", `${L.entropy[t].toFixed(2)} of ${Math.log2(E).toFixed(2)} bits`]);
    if (taker) lines.push(["Taken by", plural(picks[t].length, "expert")]);
    else lines.push(["Dropped", lost.length ? `by expert ${lost.join(", ")}, which was full` : "no"]);
    return lines;
  }
  function show(t) {
    for (const cell of strip.querySelectorAll(".mm-here")) cell.classList.remove("mm-here");
    if (t == null) {
      const mean = L.load.map((_, e) => L.probs.reduce((sum, row) => sum + row[e], 0) / T);
      panel.replaceChildren(h("p", { class: "mm-head" }, "Mean over the text"),
        h("p", { class: "mm-note" }, "Point at a token, or go over the text with the arrow keys, to see its own."),
        columns(mean, Math.max(2 / E, ...mean), p => p.toFixed(2))[0]);
      return;
    }
    const probs = L.probs[t], [box, marks] = columns(probs, Math.max(...probs), p => p.toFixed(2));
    box.setAttribute("aria-hidden", "true");
    for (const c of picks[t]) marks[c.e].classList.add("mm-chosen");
    const ranks = picks[t].map(c => h("li", c.kept ? {} : { class: "mm-lost" }, badge(c.e),
      span("", `weight ${c.w.toFixed(3)}`), span("mm-quiet", `probability ${probs[c.e].toFixed(3)}`)));
    panel.replaceChildren(
      h("p", { class: "mm-head" }, span("mm-mono", labels[t]),
        span("mm-quiet", `token ${t} · id ${trace.ids[t]} · layer ${L.index}`)),
      h("p", { class: "mm-note" }, "Probability of each expert"), box, h("ol", { class: "mm-ranks" }, ...ranks),
      h("dl", { class: "mm-facts" }, ...facts(t).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
    for (const row of cells) row[t].classList.add("mm-here");
    const left = cells[0][t].offsetLeft, seen = left - strip.scrollLeft;          // scrolls the strip, never the page
    if (seen < 40 || seen > strip.clientWidth - 20) strip.scrollLeft = left - strip.clientWidth / 2;
  }
  function say() {
    spoken.textContent = token == null ? "" : `Layer ${L.index}, token ${token}, ${said(token)}: ` +
      (picks[token].map(c => `expert ${c.e} weight ${c.w.toFixed(2)}`).join(", ") || "no expert") + ". " +
      facts(token).map(([name, value]) => `${name} ${value}`).join(". ") + ".";
  }
  function pin(t) {
    if (token != null) chips[token].setAttribute("aria-selected", "false");
    token = t;
    if (t != null) { chips[t].setAttribute("aria-selected", "true"); markToken(t); }
    show(t); say();
  }

  // --- the experts ---------------------------------------------------------------------------------------------------
  const load = h("div", { class: "mm-load" }), list = h("div", { class: "mm-list" });
  let bars = [];
  function drawLoad() {
    const at = Math.max(0, bars.findIndex(bar => bar.tabIndex === 0)), focused = bars.includes(document.activeElement);
    const [box, marks] = columns(L.load, highest, share => (100 * share).toFixed(0) + "%", true);
    bars = marks;
    box.setAttribute("role", "toolbar");
    box.setAttribute("aria-label", `Experts of layer ${L.index}: choose one to see its tokens`);
    bars.forEach((bar, e) => {
      const tokens = plural(picks.filter((_, t) => took(t, e)).length, "token");
      bar.setAttribute("aria-label", `Expert ${e}: ${percent(L.load[e])} of the load, ${tokens}`);
      bar.setAttribute("title", `Expert ${e}: ${percent(L.load[e])}, ${tokens}; an even share is ${percent(1 / E)}`);
      bar.dataset.expert = e; bar.dataset.load = L.load[e];
      bar.addEventListener("click", () => choose(expert === e ? null : e));
    });
    rove(box, bars, along(E))(at);
    load.replaceChildren(box);
    if (focused) bars[at].focus();
  }
  function choose(e) {
    expert = e;
    root.classList.toggle("mm-filtering", e != null);
    bars.forEach((bar, i) => bar.setAttribute("aria-pressed", String(i === e)));
    chips.forEach((chip, t) => {                                // a chosen expert lends its color to all its tokens
      const lit = e != null && took(t, e), first = lit ? picks[t].find(c => c.e === e) : picks[t][0];
      chip.classList.toggle("mm-took", lit);
      if (first) paint(chip, first.e, first.strength); else chip.style.removeProperty("--e");
      for (const n of chip.lastChild.children) n.classList.toggle("mm-this", lit && +n.textContent === e);
    });
    if (e == null) {
      list.replaceChildren(h("p", { class: "mm-note" }, "Choose an expert to see the tokens that it took."));
      return;
    }
    const counts = new Map();
    labels.forEach((label, t) => { if (took(t, e)) counts.set(label, (counts.get(label) || 0) + 1); });
    const total = [...counts.values()].reduce((a, b) => a + b, 0);
    const items = [...counts].sort((a, b) => b[1] - a[1]).map(([label, n]) =>
      h("li", {}, span("mm-mono", label), ...(n > 1 ? [span("mm-quiet", ` × ${n}`)] : [])));
    list.replaceChildren(h("p", { class: "mm-head", role: "status" }, span("mm-hidden", "Expert"), badge(e),
      `took ${total} of ${plural(T, "token")}`), h("ul", { class: "mm-tokens" }, ...items));
  }

  // --- all layers at once --------------------------------------------------------------------------------------------
  const cells = trace.layers.map((l, i) => trace.tokens.map((_, t) => {
    const e = l.experts[t][0], cell = h("span", { class: "mm-cell", "data-row": i, "data-column": t }, e < 0 ? "–" : e);
    return e < 0 ? cell : paint(cell, e, strength(l, t, 0));
  }));
  const rows = trace.layers.map((l, i) => h("div", { class: "mm-row" }, span("mm-side", l.index), ...cells[i]));
  const strip = h("div", { class: "mm-strip", role: "img", tabindex: 0, ...KEYS, "aria-label":
    `First choice of every token in ${plural(rows.length, "layer")}; the table below holds the same` }, ...rows);
  strip.addEventListener("click", event => {
    const cell = event.target.closest("[data-row]");
    if (cell) { setLayer(+cell.dataset.row); pin(+cell.dataset.column); }
  });

  // --- the same as a table -------------------------------------------------------------------------------------------
  const tableRows = h("tbody"), caption = h("caption");
  const heads = ["Position", "Token", "Layer", "First expert", "Weight", "Second expert", "Weight",
    taker ? "Taken by" : "Dropped by"].map(head => h("th", { scope: "col" }, head));
  const details = h("details", { class: "mm-table" }, h("summary", { ...KEYS }, "The same as a table"),
    h("div", { class: "mm-scroll", tabindex: 0, role: "region", "aria-label": "Table of the routing", ...KEYS },
      h("table", {}, caption, h("thead", {}, h("tr", {}, ...heads)), tableRows)));
  function drawTable() {
    caption.textContent = `Layer ${L.index}: the experts of each token`;
    tableRows.replaceChildren(...picks.map((chosen, t) => {
      const lost = chosen.filter(c => !c.kept).map(c => c.e).join(", ");
      const pair = c => c ? [c.e, c.w.toFixed(3)] : ["none", ""];
      const last = taker ? plural(chosen.length, "expert") : lost || "none";
      return h("tr", {}, h("td", {}, t), h("th", { scope: "row" }, labels[t]),
        ...[L.index, ...pair(chosen[0]), ...pair(chosen[1]), last].map(value => h("td", {}, value)));
    }));
  }

  function setLayer(i) {
    layer = i; L = trace.layers[i];
    picks = L.experts.map((row, t) => row.map((e, k) =>
      ({ e, w: L.weights[t][k], kept: L.kept[t][k], strength: strength(L, t, k) })).filter(c => c.e >= 0));
    markLayer(i);
    radios.forEach((radio, j) => radio.setAttribute("aria-checked", String(i === j)));
    rows.forEach((row, j) => row.classList.toggle("mm-now", i === j));
    chips.forEach((chip, t) => {
      const first = picks[t].slice(0, 2);
      const numbers = first.map(c => paint(span(c.kept ? "" : "mm-lost", c.e), c.e, c.strength));
      chip.dataset.experts = picks[t].map(c => c.e).join(",");
      chip.dataset.weights = picks[t].map(c => c.w).join(",");
      chip.dataset.kept = picks[t].map(c => +c.kept).join(",");
      chip.lastChild.replaceChildren(...(numbers.length ? numbers : [span("", "–")]));
      chip.setAttribute("aria-label", `${said(t)}, ${first.map(c => `expert ${c.e}`).join(" then ") || "no expert"}`);
    });
    drawLoad(); choose(expert); drawTable(); show(token); say();
  }

  const block = (name, note, ...inside) => h("div", { class: "mm-block" },
    h("p", { class: "mm-label" }, h("b", {}, name), " ", span("mm-quiet", note)), ...inside);
  const notes = [taker ? "Color and first number: the expert that weighs most. Second number: the next one."
    : trace.top_k > 1 ? "Color and first number: first choice, stronger with more weight. Second number: second choice."
      : "Color and number: the chosen expert, stronger with more weight."];
  if (trace.left_out) notes.push(`The first ${T} of ${T + trace.left_out} tokens; ${trace.left_out} are left out.`);
  const root = h("div", { class: "mm-body" },
    h("div", { class: "mm-bar-top" }, span("mm-name", "Layer"), layers),
    h("div", { class: "mm-main" },
      h("div", { class: "mm-reading" }, flow, ...notes.map(note => h("p", { class: "mm-note" }, note))), panel), spoken,
    block("Load of the experts", `share of all choices; the dashed line is an even share, ${percent(1 / E)}`,
      h("div", { class: "mm-main" + (E > 16 ? " mm-wide" : "") }, load, list)),
    block("All layers", "first choice of every token, one row a layer", strip), details);
  root.addEventListener("keydown", event => {
    if (event.key !== "Escape") return;
    event.preventDefault(); event.stopPropagation();
    choose(null); pin(null);
  });
  setLayer(layer);
  return root;
}

function render({ model, el }) {
  const summary = h("p", { class: "mm-summary" }), status = h("p", { class: "mm-status", role: "status" });
  const select = h("select", KEYS), choice = h("label", { class: "mm-pick" }, "Text", select);
  const area = h("textarea", { rows: 2, spellcheck: "false", ...KEYS });
  const form = h("form", { class: "mm-form" }, h("label", {}, "Your own text (Ctrl+Enter traces it)", area),
    button("", { type: "submit" }, "Trace"));
  const slot = h("div"), root = h("section", { class: "minimoe-widget minimoe-explorer" },
    h("div", { class: "mm-top" }, summary, choice, form, status), slot);
  let at = 0;
  function draw() {
    const state = model.get("state"), item = state.items[at], trace = item.trace, routed = trace.layers.length;
    state.palette.forEach((color, i) => root.style.setProperty(`--mm-c${i}`, color));
    summary.textContent = [
      `${trace.n_experts} experts` + (trace.router === "expert_choice" ? "" : `, ${trace.top_k} per token`),
      `${trace.router.replace("_", " ")} router`,
      routed === trace.n_layers ? plural(routed, "layer") : `experts in ${routed} of ${trace.n_layers} layers`,
      plural(trace.tokens.length, "token")].join(" · ");
    root.setAttribute("aria-label", item.alt);
    select.replaceChildren(...state.items.map((other, i) => h("option", { value: i }, other.name)));
    select.value = at;
    choice.hidden = state.items.length < 2; form.hidden = !state.live;
    slot.replaceChildren(body(item, state.layer));
  }
  const changed = () => { at = 0; draw(); };
  const answered = message => { status.textContent = message.error; };
  select.addEventListener("change", () => { at = +select.value; draw(); });
  form.addEventListener("submit", event => {
    event.preventDefault();
    status.textContent = "Tracing …";
    model.send({ text: area.value });
  });
  area.addEventListener("keydown", event => {
    event.stopPropagation();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
  });
  model.on("change:state", changed); model.on("msg:custom", answered);
  draw();
  el.replaceChildren(root);
  return () => { model.off("change:state", changed); model.off("msg:custom", answered); };
}
export default { render };
