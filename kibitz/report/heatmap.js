"use strict";
/* The heat-map: draws the rollouts that are looked at, colours their tokens, and shows a card for one of them.
   Model text enters the page through textContent only. */
(() => {
  let { levels, runs, strings } = JSON.parse(document.getElementById("rollouts").textContent);
  const [TEXT, STUDENT, TEACHER, KL, STUDENT_TOP, TEACHER_TOP, VOICES] = [0, 1, 2, 3, 4, 5, 6];
  const PER_PAGE = 2000, OPEN = 4, STRIP_FROM = 200, STRIP_BINS = 120;
  const place = document.getElementById("pairs");
  const card = document.getElementById("card");
  let scale = "penalty", shownFor = null;

  const el = (tag, className = "", text = "") => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== "") element.textContent = text;
    return element;
  };
  const checked = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value ?? "all";
  const penalty = (token) => token[STUDENT] === null || token[TEACHER] === null ? null : token[STUDENT] - token[TEACHER];
  const heat = (token) => {
    const nats = scale === "penalty" ? penalty(token) : token[KL];
    return nats === null ? 0 : levels.filter((bound) => nats >= bound).length;
  };
  const percent = (p) => p > 0 && p < 0.001 ? "<0.1%" : `${(100 * p).toFixed(1)}%`;
  const dotted = (index) => strings[index].replaceAll(" ", "·") || "∅";
  const nats = (value) => value === null ? "–" : `${value < 0 ? "−" : ""}${Math.abs(value).toFixed(2)} nats`;

  /* ---------------------------------------------------------------- one rollout */

  const tokenSpan = (side, index) => {
    const token = side.tokens[index], text = strings[token[TEXT]];
    const span = el("span", `t h${heat(token)}`, text || "∅");
    span.dataset.index = index;
    span.tabIndex = -1;
    span.setAttribute("role", "option");
    if (/^ (?!\p{L})/u.test(text)) span.classList.add("space"); // before a word everybody sees it
    if (index === side.fork) span.classList.add("fork");
    return span;
  };

  const fill = (box, until) => {
    const { side } = box, fragment = document.createDocumentFragment();
    const end = Math.min(until, side.tokens.length);
    for (let i = box.tokenSpans.length; i < end; i++) {
      box.tokenSpans.push(fragment.appendChild(tokenSpan(side, i)));
    }
    box.append(fragment);
    const left = side.tokens.length - box.tokenSpans.length;
    box.more.hidden = left === 0;
    box.more.textContent = `Show ${Math.min(PER_PAGE, left)} more of ${side.tokens.length} tokens`;
    if (left === 0 && !side.finished) box.append(el("span", "cut", "cut off here"));
  };

  const goTo = (box, index) => {
    if (index < 0 || index >= box.side.tokens.length) return;
    if (index >= box.tokenSpans.length) fill(box, index + PER_PAGE);
    box.tokenSpans[index].focus();
    box.tokenSpans[index].scrollIntoView({ block: "nearest" });
  };

  const strip = (box) => {
    const { tokens } = box.side, bins = Math.min(STRIP_BINS, tokens.length), line = el("div", "strip");
    line.title = "The whole response from left to right; click to go there";
    for (let bin = 0; bin < bins; bin++) {
      const [from, to] = [bin, bin + 1].map((edge) => Math.floor(edge * tokens.length / bins));
      const heats = tokens.slice(from, to).map(heat), worst = from + heats.indexOf(Math.max(...heats));
      const mark = line.appendChild(el("i", `h${Math.max(...heats)}`));
      mark.dataset.index = worst;
    }
    line.addEventListener("click", (event) => event.target.dataset.index && goTo(box, Number(event.target.dataset.index)));
    return line;
  };

  const verdict = (side) => side.right === null ? "" : side.right ? "right" : "wrong";

  const sideBlock = (side, title, prompt) => {
    const block = el("div", "side"), head = block.appendChild(el("p", "side-head"));
    if (title) head.append(el("strong", "", title));
    if (verdict(side)) head.append(el("span", `verdict ${verdict(side)}`, verdict(side)));
    if (side.reward !== null && ![0, 1].includes(side.reward)) head.append(el("span", "", `reward ${side.reward}`));
    head.append(el("span", "", `${side.tokens.length} tokens`));
    const box = el("div", "rollout");
    Object.assign(box, { side, tokenSpans: [], more: el("button", "more") });
    box.more.type = "button";
    box.more.addEventListener("click", () => fill(box, box.tokenSpans.length + PER_PAGE));
    if (!side.tokens.length) {
      block.append(el("p", "rollout plain", side.response || "The response is empty."));
      return block;
    }
    box.setAttribute("role", "listbox");
    box.setAttribute("aria-label", `${title || "Response"} to ${prompt}, token by token`);
    fill(box, PER_PAGE);
    box.tokenSpans[0].tabIndex = 0;
    if (side.fork !== null && side.tokens.length >= STRIP_FROM) {
      const jump = head.appendChild(el("button", "jump", "go to the fork"));
      jump.type = "button";
      jump.addEventListener("click", () => goTo(box, side.fork));
    }
    if (side.tokens.length >= STRIP_FROM) block.append(strip(box));
    block.append(box, box.more);
    return block;
  };

  /* ---------------------------------------------------------------- the list of prompts */

  const sideTitle = (pair, index) => {
    const { step } = pair.sides[index], at = step === null ? "" : `, step ${step}`;
    return pair.sides.length > 1 ? `${index === 0 ? "Before" : "After"}${at}` : step === null ? "" : `Step ${step}`;
  };

  const pairBlock = (pair) => {
    const block = el("details", "pair"), head = block.appendChild(el("summary"));
    head.append(el("span", "prompt", pair.prompt));
    if (pair.answer) head.append(el("span", "answer", `answer ${pair.answer}`));
    const words = pair.sides.map(verdict).filter(Boolean);
    if (words.length) {
      const fate = head.appendChild(el("span", "fate"));
      words.forEach((word, i) => fate.append(i ? " → " : "", el("span", `verdict ${word}`, word)));
    }
    block.fill = () => {
      if (block.filled) return;
      block.filled = true;
      if (pair.prompt.length > 80 || pair.prompt.includes("\n")) block.append(el("pre", "whole-prompt", pair.prompt));
      const sides = block.appendChild(el("div", "sides"));
      pair.sides.forEach((side, i) => sides.append(sideBlock(side, sideTitle(pair, i), pair.prompt)));
    };
    block.addEventListener("toggle", () => block.open && block.fill());
    return block;
  };

  const fits = (side, wish) => wish === "all" || (side !== undefined && verdict(side) === wish);

  const list = () => {
    hide();
    const { pairs } = runs[Number(document.getElementById("run")?.value ?? 0)];
    const wanted = pairs.filter(({ sides }) => fits(sides[0], checked("filter")) && fits(sides[1], checked("filter-after")));
    const blocks = wanted.map(pairBlock);
    blocks.slice(0, OPEN).forEach((block) => { block.open = true; block.fill(); });
    place.replaceChildren(...blocks);
    if (!wanted.length) place.append(el("p", "empty", "No rollout is like that."));
    document.getElementById("shown").textContent = `${wanted.length} of ${pairs.length} prompts`;
  };

  const recolour = () => {
    scale = checked("scale");
    for (const box of place.querySelectorAll(".rollout:not(.plain)")) {
      box.tokenSpans.forEach((span, i) => { span.className = span.className.replace(/\bh\d\b/, `h${heat(box.side.tokens[i])}`); });
      box.parentElement.querySelector(".strip")?.replaceWith(strip(box));
    }
    for (const word of document.querySelectorAll("#legend [data-scale]")) word.hidden = word.dataset.scale !== scale;
  };

  /* ---------------------------------------------------------------- the card of a token */

  const bars = (title, top, said, p) => {
    const block = el("div", "tally"), rows = [];
    block.append(el("h4", "", title));
    for (let i = 0; i < top.length; i += 2) rows.push([top[i], top[i + 1]]);
    if (p !== null && !rows.some(([text]) => text === said)) rows.push([said, p]);
    for (const [text, share] of rows) {
      const row = block.appendChild(el("div", text === said ? "bar said" : "bar"));
      row.append(el("code", "", dotted(text)));
      const track = row.appendChild(el("span", "fill"));
      track.appendChild(el("i")).style.width = `${Math.min(100, 100 * share)}%`;
      row.append(el("span", "share", percent(share)));
    }
    if (!rows.length) block.append(el("p", "empty", "not recorded"));
    return block;
  };

  const inWords = (token) => {
    const value = penalty(token), instead = token[TEACHER_TOP][0];
    if (value === null) return "One of the models did not score this token.";
    if (value < levels[0] && value > -levels[0]) return "The teacher would have said it too.";
    const times = Math.exp(Math.abs(value)), ratio = times > 1e6 ? "a million" : times >= 10 ? Math.round(times).toLocaleString("en") : times.toFixed(1);
    const likely = `The teacher finds it ${ratio}${times > 1e6 ? " times or more" : "×"} ${value > 0 ? "less" : "more"} likely`;
    return value > 0 && instead !== undefined && instead !== token[TEXT] ? `${likely}; it would rather say ${dotted(instead)}` : `${likely}.`;
  };

  const show = (span) => {
    const box = span.parentElement, index = Number(span.dataset.index), token = box.side.tokens[index];
    const p = [token[STUDENT], token[TEACHER]].map((logp) => logp === null ? null : Math.exp(logp));
    const head = el("p", "card-head");
    head.append(el("code", "", dotted(token[TEXT])), el("span", "", `token ${index + 1} of ${box.side.tokens.length}`));
    if (index === box.side.fork) head.append(el("b", "fork-word", "fork"));
    const tops = el("div", "tops"), facts = el("p", "card-facts");
    tops.append(bars("Student", token[STUDENT_TOP], token[TEXT], p[0]), bars("Teacher", token[TEACHER_TOP], token[TEXT], p[1]));
    facts.append(el("span", "", `penalty ${nats(penalty(token))}`), el("span", "", `reverse KL ${nats(token[KL])}`));
    token[VOICES].forEach(([logp, kl, top], i) => {
      const [name, weight] = box.side.teachers[i] ?? ["", null], share = weight ? ` (${percent(weight)})` : " (silent)";
      tops.append(bars(`${name}${share}`, top, token[TEXT], logp === null ? null : Math.exp(logp)));
      facts.append(el("span", "", `${name} is ${nats(kl)} from all of them`));
    });
    card.replaceChildren(head, el("p", "card-words", inWords(token)), tops, facts);
    card.hidden = false;
    shownFor?.classList.remove("looked-at");
    shownFor?.removeAttribute("aria-describedby");
    shownFor = span;
    span.classList.add("looked-at");
    span.setAttribute("aria-describedby", "card");
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect(), wide = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(at.left - 24, wide - card.offsetWidth - 8));
    const above = at.bottom + card.offsetHeight + 12 > innerHeight && at.top > card.offsetHeight + 12;
    card.style.left = `${left + scrollX}px`;
    card.style.top = `${scrollY + (above ? at.top - card.offsetHeight - 8 : at.bottom + 8)}px`;
  };

  function hide() {
    card.hidden = true;
    shownFor?.classList.remove("looked-at");
    shownFor?.removeAttribute("aria-describedby");
    shownFor = null;
  }

  const tokenOf = (event) => event.target instanceof Element ? event.target.closest(".t") : null;
  const focused = () => place.contains(document.activeElement) && document.activeElement.matches(".t") ? document.activeElement : null;
  place.addEventListener("pointerover", (event) => { const span = tokenOf(event); if (span) show(span); });
  place.addEventListener("pointerout", (event) => {
    if (tokenOf(event) && !event.relatedTarget?.closest?.(".t")) focused() ? show(focused()) : hide();
  });
  place.addEventListener("focusin", (event) => {
    const span = tokenOf(event);
    if (!span) return;
    span.parentElement.querySelector('.t[tabindex="0"]')?.setAttribute("tabindex", "-1");
    span.tabIndex = 0;
    show(span);
  });
  place.addEventListener("focusout", hide);
  place.addEventListener("keydown", (event) => {
    const span = tokenOf(event);
    if (!span || event.ctrlKey || event.metaKey || event.altKey) return;
    const box = span.parentElement, index = Number(span.dataset.index);
    const target = { ArrowRight: index + 1, ArrowLeft: index - 1, ArrowDown: below(span, 1), ArrowUp: below(span, -1),
      Home: 0, End: box.tokenSpans.length - 1, f: box.side.fork }[event.key];
    if (event.key === "Escape") hide();
    if (target === undefined || target === null) return;
    event.preventDefault();
    goTo(box, target);
  });

  /* The token one line further down (or up) that stands nearest to this one. */
  function below(span, direction) {
    const spans = span.parentElement.tokenSpans, from = span.getBoundingClientRect();
    let line = null, best = null, distance = Infinity;
    for (let i = Number(span.dataset.index) + direction; i >= 0 && i < spans.length; i += direction) {
      const at = spans[i].getBoundingClientRect();
      if (Math.abs(at.top - from.top) < from.height / 2) continue;
      if (line !== null && Math.abs(at.top - line) > from.height / 2) break;
      line = at.top;
      const off = Math.abs(at.left - from.left);
      if (off < distance) [best, distance] = [i, off];
    }
    return best;
  }

  for (const id of ["run", "filter", "filter-after"]) document.getElementById(id)?.addEventListener("change", list);
  document.getElementById("scale").addEventListener("change", recolour);
  list();

  /* Somebody wants to see a token of the first side of a pair. */
  document.addEventListener("showtoken", ({ detail: { pair, token } }) => {
    for (const all of document.querySelectorAll('#controls input[value="all"]')) all.checked = true;
    list();
    const block = place.querySelectorAll(".pair")[pair];
    block.open = true;
    block.fill();
    goTo(block.querySelector(".rollout"), token);
  });

  /* Other rollouts, of a run that goes on: they wait until nobody looks at a token. What is open stays open. */
  let waiting = null;
  const take = () => {
    if (!waiting || shownFor) return;
    const open = new Set([...place.querySelectorAll(".pair[open] .prompt")].map((prompt) => prompt.textContent)), first = !runs.some((run) => run.pairs.length);
    ({ levels, runs, strings } = waiting);
    waiting = null;
    list();
    if (first) return;
    for (const block of place.querySelectorAll(".pair")) block.open = open.has(block.querySelector(".prompt").textContent);
  };
  document.addEventListener("rolloutschange", ({ detail }) => { waiting = detail; take(); });
  for (const leave of ["pointerout", "focusout"]) place.addEventListener(leave, () => setTimeout(take));
})();
