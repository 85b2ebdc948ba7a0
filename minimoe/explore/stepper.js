// The stepper: one token on its way through a router, run by anywidget in JupyterLab and inlined on a page without a kernel.
// Every string that comes from a text is set as text, never as HTML.
const KEYS = { "data-lm-suppress-shortcuts": "true" };      // else JupyterLab takes the arrow keys of what has the focus

function h(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// softmax((logits + noise) / temperature) over all experts, then the k likeliest; of equal ones the lower number
function route(logits, { k, temperature, noise, normalize }, dice) {
  const scores = logits.map((x, e) => (x + noise * dice[e]) / temperature), top = Math.max(...scores);
  const powers = scores.map(s => Math.exp(s - top)), total = powers.reduce((a, b) => a + b, 0);
  const probs = powers.map(p => p / total);
  const chosen = probs.map((p, e) => e).sort((a, b) => scores[b] - scores[a] || a - b).slice(0, k);
  const sum = chosen.reduce((s, e) => s + probs[e], 0);
  const weights = probs.map((p, e) => chosen.includes(e) ? (normalize ? p / sum : p) : 0);
  return { scores, probs, chosen, weights, sum };
}

const digits = (x, n = 3) => (Math.abs(x) < .5 / 10 ** n ? 0 : x).toFixed(n).replace("-", "−");
const list = items => items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items[items.length - 1]}`;
const ranks = n => `${n}${["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] || "th"}`;

const SLIDERS = [["k", "Experts per token, k", 1, null, 1, v => v], ["temperature", "Temperature", .1, 4, .1, v => v.toFixed(1)],
                 ["noise", "Noise", 0, 3, .1, v => v.toFixed(1)]];

function render({ model, el }) {
  const state = model.get("state"), start = { ...state.start }, E = state.dice.length;
  let set = { ...start }, at = 0, logits = [...state.examples[0].logits];
  const root = h("section", { class: "minimoe-widget minimoe-explorer minimoe-stepper", "aria-label": state.alt });
  state.palette.forEach((color, i) => root.style.setProperty(`--mm-c${i}`, color));

  // --- the controls ---------------------------------------------------------------------------------------------------
  const select = h("select", { "aria-label": "Token", ...KEYS }, ...state.examples.map((x, i) => h("option", { value: i }, x.name)));
  const sliders = SLIDERS.map(([name, label, low, high, step, show]) => {
    const input = h("input", { type: "range", name, min: low, max: high ?? E, step, "aria-label": label, ...KEYS });
    const out = h("b", { "aria-hidden": "true" });
    input.addEventListener("input", () => { set[name] = +input.value; draw(true); });
    return { name, input, out, show, box: h("label", { class: "mm-slider" }, h("span", {}, label, " ", out), input) };
  });
  const check = h("input", { type: "checkbox", name: "normalize", ...KEYS });
  const reset = h("button", { type: "button", ...KEYS }, "Reset");
  check.addEventListener("change", () => { set.normalize = check.checked; draw(true); });
  reset.addEventListener("click", () => { set = { ...start }; take(at, true); });
  select.addEventListener("change", () => take(+select.value, true));

  // --- one row an expert: its numbers from left to right ----------------------------------------------------------------
  const cell = (name, wide) => h("td", { class: `mm-step mm-${name}` }, h("span", { class: "mm-digits" }),
    ...(wide ? [h("span", { class: "mm-track", "aria-hidden": "true" }, h("span", { class: "mm-fill" }))] : []));
  const rows = Array.from({ length: E }, (_, e) => {
    const input = h("input", { type: "number", step: .1, min: -20, max: 20, "aria-label": `Logit of expert ${e}`, ...KEYS });
    input.addEventListener("input", () => {
      if (!input.checkValidity() || input.value === "") return;     // half typed: "-", or out of range
      logits[e] = +input.value;
      draw(true);
    });
    const badge = h("span", { class: "mm-badge mm-one" }, e), cells = [cell("score"), cell("prob", true), cell("rank"), cell("weight", true)];
    badge.style.setProperty("--e", `var(--mm-c${e % 8})`);
    const row = h("tr", { "data-expert": e }, h("th", { scope: "row" }, badge), h("td", { class: "mm-step" }, input), ...cells);
    cells.forEach(c => c.style.setProperty("--e", `var(--mm-c${e % 8})`));
    return { row, input, cells };
  });
  const heads = [["Expert", ""], ["Logit", "yours to change"], ["Score", "(logit + noise) ÷ temperature"],
    ["Softmax", "over all experts"], ["Top-k", "the choice"], ["Weight", "of the expert's output"]];
  const sums = [cell("prob", true), cell("weight", true)], blank = name => h("td", { class: `mm-step ${name}` });
  const foot = [h("th", { scope: "row" }, "Sum"), blank(""), blank("mm-score"), sums[0], blank("mm-rank"), sums[1]];
  const table = h("table", { class: "mm-steps" }, h("thead", {}, h("tr", {}, ...heads.map(([name, note]) =>
    h("th", { scope: "col" }, name, ...(note ? [h("span", { class: "mm-quiet" }, note)] : []))))),
    h("tbody", {}, ...rows.map(r => r.row)), h("tfoot", {}, h("tr", {}, ...foot)));

  const told = h("p", { class: "mm-told" }), spoken = h("p", { class: "mm-hidden", role: "status", "aria-live": "polite" });
  const context = h("p", { class: "mm-context" });

  function draw(changed) {
    const { scores, probs, chosen, weights, sum } = route(logits, set, state.dice);
    for (const { name, input, out, show } of sliders) { input.value = set[name]; out.textContent = show(set[name]); }
    check.checked = set.normalize;
    rows.forEach(({ row, input, cells }, e) => {
      const rank = chosen.indexOf(e), values = [scores[e], probs[e], rank, weights[e]];
      const words = [digits(scores[e], 2), digits(probs[e]), rank < 0 ? "–" : ranks(rank + 1), rank < 0 ? "–" : digits(weights[e])];
      if (+input.value !== logits[e] || input.value === "") input.value = logits[e];
      row.classList.toggle("mm-in", rank >= 0);
      cells.forEach((c, i) => {
        c.dataset.value = values[i];
        c.firstChild.textContent = words[i];
        const fill = c.querySelector(".mm-fill");
        if (fill) fill.style.width = `${100 * Math.max(0, values[i])}%`;
      });
    });
    [1, set.normalize ? 1 : sum].forEach((total, i) => { sums[i].firstChild.textContent = digits(total); });
    const names = `expert${chosen.length > 1 ? "s" : ""} ${list(chosen)}`;
    const out = chosen.map(e => `${digits(weights[e], 2)} × expert ${e}`).join(" + ");
    const next = probs.map((p, e) => e).filter(e => !chosen.includes(e)).sort((a, b) => scores[b] - scores[a])[0];
    const margin = next == null ? "" : ` Expert ${next} missed the choice by ${digits(scores[chosen[chosen.length - 1]] - scores[next], 2)}.`;
    told.textContent = `The token goes to ${names}: output = ${out}. The chosen probabilities sum to ${digits(sum)}` +
      (set.normalize ? ", and each is divided by that." : ", and stay as they are.") + margin;
    if (changed) spoken.textContent = `Output ${out}.${margin}`;
  }
  function take(i, changed) {
    at = i; select.value = i;
    logits = [...state.examples[i].logits];
    const { before, token, after, where } = state.examples[i];
    context.replaceChildren(h("span", { class: "mm-quiet" }, before), h("mark", { class: "mm-mono" }, token),
      h("span", { class: "mm-quiet" }, after), h("span", { class: "mm-where" }, where));
    context.hidden = !token;
    draw(changed);
  }
  root.append(h("div", { class: "mm-top" }, h("label", { class: "mm-pick" }, "Token", select), reset), context,
    h("div", { class: "mm-controls", role: "group", "aria-label": "Settings of the router" }, ...sliders.map(s => s.box),
      h("label", { class: "mm-check" }, check, " Renormalize the weights")),
    h("div", { class: "mm-sideways" }, table), told, spoken);
  take(0);
  el.replaceChildren(root);
  return () => {};
}
export default { render };
