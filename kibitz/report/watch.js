"use strict";
/* The page of `kibitz watch`: takes server-sent events and hands what is new to the cards, the charts and the heat-map.
   The words of a card come escaped from the server; no script in them could run, because the page's policy names its own. */
(() => {
  const MAX_POINTS = 1500, MIN_REDRAW = 1000;
  const lines = JSON.parse(document.getElementById("lines").textContent);
  const names = [...document.querySelectorAll("#runs article")].map((card) => card.getAttribute("aria-label"));
  const series = names.map(() => ({}));
  const states = names.map(() => ({ state: "", alarms: 0, share: 0 }));
  const gone = document.getElementById("gone");
  const stale = new Set();
  let redrawn = 0, timer = null;

  /* ---------------------------------------------------------------- curves */

  const grow = ({ run, again, lines: news }) => {
    if (again) {
      for (const key of Object.keys(series[run])) stale.add(key);
      series[run] = {};
    }
    for (const [key, part] of Object.entries(news)) {
      const line = series[run][key] ??= { step: [], flops: [], y: [], low: [], high: [] };
      for (const name of Object.keys(line)) {
        for (let i = 0; i < part.step.length; i++) line[name].push(part[name]?.[i] ?? null);
      }
      stale.add(key);
    }
    if (!timer) timer = setTimeout(redraw, Math.max(0, redrawn + MIN_REDRAW - Date.now()));
  };

  /* As many points as a chart can show; the last always stays. */
  const thin = (values) => {
    const stride = Math.max(1, Math.ceil(values.length / MAX_POINTS));
    return values.filter((_, i) => (values.length - 1 - i) % stride === 0);
  };

  const traces = (chart) => names.flatMap((name, run) => Object.keys(lines).filter((key) => key.startsWith(`${chart}/`) && series[run][key]).flatMap((key) => {
    const line = series[run][key], { label, dash, dots } = lines[key], found = [];
    const [step, flops, y, low, high] = ["step", "flops", "y", "low", "high"].map((part) => thin(line[part]));
    if (low.every((value) => value !== null) && high.every((value) => value !== null) && (names.length === 1 || key.endsWith("/0"))) {
      const thereAndBack = (values) => [...values, ...values.slice().reverse()];
      found.push({ type: "scatter", y: [...high, ...low.slice().reverse()], mode: "lines", line: { width: 0 }, fill: "toself", hoverinfo: "skip",
        meta: { run, kind: "band", x: { step: thereAndBack(step), flops: thereAndBack(flops) } } });
    }
    found.push({ type: "scatter", y, mode: dots ? "lines+markers" : "lines", line: { dash, width: 2 }, marker: { size: 6 }, cliponaxis: false,
      name: escaped(names.length > 1 ? `${name}, ${label}` : label), hovertemplate: "%{y:,.4~r}", meta: { run, kind: "line", x: { step, flops } } });
    return found;
  }));

  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  const redraw = () => {
    timer = null;
    if (document.hidden) return;  // comes back by visibilitychange
    redrawn = Date.now();
    const changed = {};
    for (const chart of new Set([...stale].map((key) => key.split("/")[0]))) {
      const data = traces(chart), figure = document.querySelector(`[data-chart="${chart}"]`).closest("figure");
      figure.hidden = !data.some((trace) => trace.meta.kind === "line" && trace.y.length > 1);
      changed[chart] = data;
    }
    stale.clear();
    const all = series.flatMap((run) => Object.values(run));
    document.getElementById("curves").hidden = !document.querySelector("#curves figure:not([hidden])");
    document.getElementById("axis").hidden = !all.length || !all.every((line) => line.flops.every((value) => value !== null));
    document.dispatchEvent(new CustomEvent("figureschange", { detail: changed }));
  };
  document.addEventListener("visibilitychange", () => { if (!document.hidden && stale.size) redraw(); });

  /* ---------------------------------------------------------------- cards */

  const STATES = { waiting: "waits for its folder", running: "is running", silent: "has gone silent", stopped: "has stopped", finished: "has finished" };

  const show = ({ run, html, state, share, name, alarms, alarm }) => {
    const card = document.getElementById(`run-${run}`), scrolled = card.querySelector(".alarms")?.scrollTop ?? 0;
    card.innerHTML = html;
    if (scrolled) card.querySelector(".alarms").scrollTop = scrolled;
    const before = states[run], said = [];
    if (state !== before.state) said.push(`${name} ${STATES[state]}.`);
    if (alarms > before.alarms && alarm) said.push(`${name}: ${alarm.name}, ${alarm.symptom}.`);
    if (said.length) document.getElementById("said").textContent = said.join(" ");
    states[run] = { state, alarms, share };
    document.title = `${states.map(({ state: now, share: done }) => now === "running" ? `${Math.round(100 * done)}%` : now || "…").join(" · ")} · kibitz watch`;
  };

  /* ---------------------------------------------------------------- rollouts */

  const rollouts = (island) => {
    const { flags, runs } = island, any = runs.some((run) => run.pairs.length);
    document.getElementById("no-rollouts").hidden = any;
    document.getElementById("with-rollouts").hidden = !any;
    for (const [id, needed] of [["filter", flags.graded], ["filter-after", flags.graded && flags.paired]]) {
      const field = document.getElementById(id);
      field.hidden = !needed;
      if (!needed) field.querySelector('input[value="all"]').checked = true;
    }
    const note = document.getElementById("left-out");
    note.hidden = !flags.leftOut;
    note.textContent = `${flags.leftOut.toLocaleString("en")} more prompts are in the run folder; kibitz report shows more of them.`;
    document.dispatchEvent(new CustomEvent("rolloutschange", { detail: island }));
  };

  /* ---------------------------------------------------------------- the stream */

  const source = new EventSource("events");
  const on = (name, take) => source.addEventListener(name, (event) => take(JSON.parse(event.data)));
  on("points", grow);
  on("card", show);
  on("rollouts", rollouts);
  const says = (text) => { gone.hidden = !text; if (text) gone.textContent = text; };
  source.addEventListener("open", () => says(""));
  source.addEventListener("error", () => says(source.readyState === EventSource.CLOSED
    ? "kibitz watch has ended, and another one answers at this address: open the address that it printed."
    : "kibitz watch does not answer. What is shown is as it was; if it was ended, start it again and open the address that it prints."));
})();
