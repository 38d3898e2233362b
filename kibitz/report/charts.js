"use strict";
/* Draws the plotly figures when they come near the screen, and paints them in the theme's colours. */
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const charts = [...document.querySelectorAll(".chart")];
  const hidden = new Set();
  const drawn = new Set();

  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const colour = (name, alpha = 1) => {
    probe.style.color = `var(--${name})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/[\d.]+/g);
    return `rgba(${r},${g},${b},${alpha})`;
  };

  const against = () => document.querySelector('input[name="axis"]:checked')?.value ?? "step";

  const paint = (given) => {
    const { run, kind, x } = given.meta;
    const trace = x ? { ...given, x: x[against()] } : given;
    const name = `${kind === "bar" ? "phase" : "run"}-${run % 6}`;
    const visible = kind === "bar" || !hidden.has(run);
    if (kind === "bar") return { ...trace, marker: { color: colour(name), line: { color: colour("paper"), width: 2 } } };
    if (kind === "band") return { ...trace, visible, fillcolor: colour(name, 0.16) };
    return {
      ...trace, visible,
      line: { ...trace.line, color: colour(name) },
      marker: { ...trace.marker, color: colour(name) },
    };
  };

  const axis = (given) => ({
    ...given, spikecolor: colour("muted"), spikethickness: 1, spikedash: "dot", automargin: true, gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, fixedrange: true,
    tickfont: { color: colour("muted"), size: 11 },
    title: { ...given.title, font: { color: colour("muted"), size: 11 }, standoff: 6 },
  });

  const draw = (element) => {
    const { data, layout } = figures[element.dataset.chart];
    const byCompute = against() === "flops" && !element.closest(".costs");
    const inFlops = byCompute ? { title: { text: "FLOP so far" }, tickformat: "~s", hoverformat: ".3~s" } : {};
    drawn.add(element);
    Plotly.react(element, data.map(paint), {
      ...layout, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: colour("paper"),
      font: { family: getComputedStyle(document.body).fontFamily, color: colour("ink"), size: 12 },
      hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12 } },
      xaxis: axis({ ...layout.xaxis, ...inFlops }),
      yaxis: { ...axis(layout.yaxis), showspikes: false },
    }, { displayModeBar: false, responsive: true });
  };
  const redraw = () => drawn.forEach(draw);

  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) { near.unobserve(target); draw(target); }
    }
  }, { rootMargin: "400px" });
  charts.forEach((chart) => near.observe(chart));
  addEventListener("beforeprint", () => charts.forEach(draw));
  document.addEventListener("themechange", redraw);
  document.addEventListener("figureschange", ({ detail }) => {  // new traces, by chart
    for (const [key, data] of Object.entries(detail)) figures[key].data = data;
    [...drawn].filter((element) => element.dataset.chart in detail && element.offsetParent).forEach(draw);
  });
  document.getElementById("axis")?.addEventListener("change", redraw);

  for (const button of document.querySelectorAll(".runs button")) {
    button.style.setProperty("--run", `var(--run-${button.dataset.run % 6})`);
    button.addEventListener("click", () => {
      const run = Number(button.dataset.run);
      hidden.has(run) ? hidden.delete(run) : hidden.add(run);
      button.setAttribute("aria-pressed", String(!hidden.has(run)));
      redraw();
    });
  }
})();
