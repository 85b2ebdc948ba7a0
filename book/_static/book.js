// Draws the plotly figures of a page, in the colors of the page's theme, and draws them anew when the theme changes.
// The library (plotly.min.js) is loaded only on pages that hold a figure.
(function () {
  "use strict";
  const root = document.currentScript.src.replace(/book\.js.*$/, "");
  const COLORS = {
    light: { text: "#1b1f24", grid: "#d8dee4", line: "#6e7781", panel: "#f6f8fa", active: "#d0d7de" },
    dark: { text: "#e2e6ea", grid: "#3d444d", line: "#9aa4af", panel: "#23282f", active: "#4a525c" },
  };

  // what a figure shall look like under the page's theme; what its author chose for the marks themselves is not touched
  function themed(layout) {
    const c = COLORS[document.documentElement.dataset.theme === "dark" ? "dark" : "light"];
    const out = structuredClone(layout || {});
    out.paper_bgcolor = out.plot_bgcolor = "rgba(0,0,0,0)";
    out.font = Object.assign({ family: getComputedStyle(document.body).fontFamily }, out.font, { color: c.text });
    out.legend = Object.assign({ bgcolor: "rgba(0,0,0,0)" }, out.legend);
    for (const axis of ["xaxis", "yaxis", ...Object.keys(out).filter((k) => /^[xy]axis\d+$/.test(k))])
      out[axis] = Object.assign({}, out[axis], { gridcolor: c.grid, zerolinecolor: c.line, linecolor: c.line, tickcolor: c.line });
    const control = { bgcolor: c.panel, bordercolor: c.line, font: { color: c.text } };
    for (const s of out.sliders || []) Object.assign(s, control, { activebgcolor: c.active, tickcolor: c.line });
    for (const m of out.updatemenus || []) Object.assign(m, control);
    return out;
  }

  function draw(div) {
    const fig = JSON.parse(div.querySelector("script").textContent);
    const target = div.querySelector(".book-plotly-target") || div.appendChild(document.createElement("div"));
    target.className = "book-plotly-target";
    target.style.height = "100%";
    const config = Object.assign({ responsive: true, displaylogo: false }, fig.config);
    delete config.plotlyServerURL;
    const layout = themed(fig.layout);
    delete layout.width; // the page decides
    return Plotly.newPlot(target, { data: fig.data, layout, frames: fig.frames, config });
  }

  document.addEventListener("DOMContentLoaded", function () {
    const figures = [...document.querySelectorAll(".book-plotly")];
    if (!figures.length) return;
    const script = document.createElement("script");
    script.src = root + "plotly.min.js";
    script.onload = function () {
      figures.forEach(draw);
      // on a change of theme only the colors are set, so a zoom or a slider's place stays
      new MutationObserver(() =>
        figures.forEach((div) => Plotly.relayout(div.querySelector(".book-plotly-target"), colorsOnly(div))),
      ).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    };
    document.head.appendChild(script);
  });

  function colorsOnly(div) {
    const layout = themed(JSON.parse(div.querySelector("script").textContent).layout);
    const out = { "font.color": layout.font.color };
    for (const axis of Object.keys(layout).filter((k) => /^[xy]axis\d*$/.test(k)))
      for (const key of ["gridcolor", "zerolinecolor", "linecolor", "tickcolor"]) out[axis + "." + key] = layout[axis][key];
    for (const kind of ["sliders", "updatemenus"])
      (layout[kind] || []).forEach((control, i) => {
        for (const key of ["bgcolor", "bordercolor"]) out[`${kind}[${i}].${key}`] = control[key];
        out[`${kind}[${i}].font.color`] = control.font.color;
      });
    return out;
  }
})();
