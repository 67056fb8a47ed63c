// The explorer of replies: filters, a group side by side, one problem through the steps.
// Every text of the model is put into the page as text, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const field = Object.fromEntries(data.fields.map((name, place) => [name, place]));
  const keys = new Set();
  const rows = data.rows.map((values, number) => {
    const row = { number };
    for (const name in field) row[name] = values[field[name]];
    row.key = [row.run, data.sources[row.source].replace(", ", "-"), row.step, row.group, row.member].join(".");
    while (keys.has(row.key)) row.key += "+"; // two generations of one step, in runs of early versions
    keys.add(row.key);
    row.lowered = null;
    return row;
  });
  const byKey = new Map(rows.map((row) => [row.key, row]));
  const groups = collect(rows, groupOf);
  const problems = collect(rows, (row) => row.run + "." + row.problem);
  const $ = (id) => document.getElementById(id);
  const list = $("list"), detail = $("detail"), form = $("filters"), count = $("count");
  const SHOWN_AT_ONCE = 60;
  // What acts instead of showing: control characters, and marks that turn the reading direction.
  const ACTING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;
  const TAGS = /<\/?(?:reasoning|answer)>/g;
  const NAMES = {
    outcome: data.outcomes, source: data.sources, change: data.changes,
    run: data.runs.map((name, at) => (data.runs.indexOf(name) === at ? name : name + " " + at)),
  };
  let found = [], shown = 0, chosen = null, mode = "group";

  function collect(all, keyOf) {
    const map = new Map();
    for (const row of all) {
      const key = keyOf(row);
      if (!map.has(key)) map.set(key, []);
      map.get(key).push(row);
    }
    return map;
  }

  function groupOf(row) {
    // An evaluation's replies to a problem are its group.
    return [row.run, row.source, row.step, row.group, row.problem].join(".");
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function appendVisible(parent, text) {
    let from = 0;
    for (const match of text.matchAll(ACTING)) {
      parent.append(text.slice(from, match.index));
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      parent.append(element("span", "control", "U+" + code));
      from = match.index + match[0].length;
    }
    parent.append(text.slice(from));
  }

  const STEP_CLASSES = ["step-right", "step-wrong", "step-unjudged"];
  const STEP_SIGNS = ["\u2713", "\u2717", "?"];

  function marked(row) {
    const block = element("pre", "text");
    const marks = [];
    for (const match of row.text.matchAll(TAGS)) marks.push([match.index, match.index + match[0].length, "tag"]);
    if (row.end > row.start) marks.push([row.start, row.end, "answer"]);
    marks.sort((one, other) => one[0] - other[0]);
    let from = 0;
    for (const [start, end, outcome] of row.steps ?? []) {
      // A line feed before a step is no line of it.
      const begin = start + row.text.slice(start, end).match(/^(?:\s*\n)?/)[0].length;
      if (begin >= end) continue;
      appendMarked(block, row.text, marks, from, begin);
      const step = element("span", "step " + STEP_CLASSES[outcome]);
      step.title = "this step: " + data.step_outcomes[outcome];
      step.dataset.sign = STEP_SIGNS[outcome];
      appendMarked(step, row.text, marks, begin, end);
      block.append(step);
      from = end;
    }
    appendMarked(block, row.text, marks, from, row.text.length);
    if (!row.text) block.append(element("i", "", "(nothing)"));
    return block;
  }

  // The text from one place to another, with what of the marks lies there.
  function appendMarked(parent, text, marks, from, to) {
    for (const [first, last, kind] of marks) {
      const start = Math.max(first, from), end = Math.min(last, to);
      if (start >= end) continue;
      appendVisible(parent, text.slice(from, start));
      const span = element("span", kind);
      if (kind === "answer") span.title = "the answer was read here";
      appendVisible(span, text.slice(start, end));
      parent.append(span);
      from = end;
    }
    appendVisible(parent, text.slice(from, to));
  }

  // "2 of 3 right, 1 not judged", as the steps of a reply were paid.
  function stepsInWords(steps) {
    const [right, wrong, unjudged] = [0, 1, 2].map((outcome) => steps.filter((step) => step[2] === outcome).length);
    const judged = right + wrong ? [right + " of " + (right + wrong) + " right"] : [];
    return [...judged, ...(unjudged ? [unjudged + " not judged"] : [])].join(", ") || "none";
  }

  const number = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));

  function place(row) {
    const source = data.sources[row.source];
    const run = data.runs.length > 1 ? data.runs[row.run] + ", " : "";
    return run + (source === "training" ? "step " + row.step + ", group " + row.group : source);
  }

  function card(row, view) {
    const outcome = data.outcomes[row.outcome];
    const made = element("article", "reply " + outcome + (row === chosen ? " chosen" : ""));
    const facts = element("p", "facts");
    const badge = element("b", "badge " + outcome, outcome);
    badge.title = data.sentences[row.outcome];
    facts.append(badge, " reward " + number(row.reward) + (row.advantage === null ? "" :
      ", advantage " + (row.advantage > 0 ? "+" : "") + number(row.advantage)));
    made.append(facts);
    if (view === "problem") made.append(element("p", "facts", place(row)));
    made.append(element("p", "facts", row.tokens + " tokens" + (row.stop === "length" ? ", cut off" : "") +
      (row.trained === false ? ", not trained on" : "")));
    const read = element("p", "facts");
    read.append("read: ");
    if (row.read === null) read.append("no answer");
    else appendVisible(read, row.read);
    if (row.disagree) read.append(" (the last number says otherwise)");
    made.append(read);
    if (row.suspicion !== null) made.append(element("p", "suspect", data.suspicions[row.suspicion]));
    made.append(marked(row));
    const table = element("table", "paid");
    data.rewards.forEach((name, at) => {
      if (row.rewards[at] === null || row.rewards[at] === undefined) return;
      const line = table.insertRow();
      const heading = element("th");
      appendVisible(heading, name);
      heading.scope = "row";
      line.append(heading);
      line.insertCell().textContent = number(row.rewards[at], 3);
    });
    if (row.steps) {
      const line = table.insertRow();
      const heading = element("th", "", "steps");
      heading.scope = "row";
      line.append(heading);
      line.insertCell().textContent = stepsInWords(row.steps);
    }
    if (table.rows.length) made.append(table);
    return made;
  }

  function show(row) {
    chosen = row;
    detail.replaceChildren();
    if (!row) return;
    const problem = data.problems[row.problem];
    const ours = groups.get(groupOf(row));
    const all = problems.get(row.run + "." + row.problem);
    // A reply that has no group, as the greedy ones of an evaluation, is shown with its problem's.
    const view = ours.length > 1 && (mode === "group" || all.length === ours.length) ? "group" : "problem";
    const change = row.change === null ? "" : " (verdict: " + data.changes[row.change] + ")";
    detail.append(element("h3", "", view === "group" ? place(row) : "All replies to this problem" + change));
    const question = element("p", "question");
    appendVisible(question, problem.question);
    const gold = element("p", "gold");
    gold.append("Right answer: ");
    const value = element("b");
    appendVisible(value, problem.gold === null ? "unknown" : problem.gold);
    gold.append(value, problem.difficulty ? " (" + problem.difficulty + " solution steps)" : "");
    const tools = element("div", "tools");
    const isSame = all.length === ours.length; // the problem was met once
    for (const [which, label] of isSame ? [] : [["group", "The group (" + ours.length + ")"], ["problem", "This problem through the steps (" + all.length + ")"]]) {
      const button = element("button", "", label);
      button.type = "button";
      button.setAttribute("aria-pressed", String(view === which));
      button.addEventListener("click", () => { mode = which; show(row); permalink(); });
      tools.append(button);
    }
    detail.append(question, gold, tools);
    const members = element("div", "members");
    const order = (one) => (data.sources[one.source].startsWith("before") ? -1 : data.sources[one.source].startsWith("after") ? Infinity : one.step);
    const replies = view === "group" ? ours : [...all].sort((one, other) => order(one) - order(other) || one.member - other.member);
    for (const one of replies.slice(0, 128)) members.append(card(one, view));
    detail.append(members);
    for (const item of list.children) item.setAttribute("aria-selected", String(item.dataset.key === row.key));
  }

  // The bounds a field names, "4" or "3-8" or "3-"; what cannot be read asks for nothing and is marked.
  function range(name) {
    const control = form.elements[name], text = control.value.trim().replaceAll(",", ".");
    const parts = text.match(/^(-?(?:\d+\.?\d*|\.\d+))?\s*(?:(-|\u2013|to)\s*(-?(?:\d+\.?\d*|\.\d+))?)?$/);
    const low = parts && parts[1] !== undefined ? Number(parts[1]) : -Infinity;
    const high = !parts || !parts[2] ? low : parts[3] === undefined ? Infinity : Number(parts[3]);
    const isRead = parts !== null && low <= high;
    control.setAttribute("aria-invalid", String(text !== "" && !isRead));
    return text === "" || !isRead ? [-Infinity, Infinity] : [low, high];
  }

  function filter() {
    const wanted = Object.fromEntries(new FormData(form));
    // A name that this page does not have (an old address) asks for nothing.
    const asked = (name) => (wanted[name] ? NAMES[name].indexOf(wanted[name]) : -1);
    const [outcome, source, run, change] = ["outcome", "source", "run", "change"].map(asked);
    const steps = range("step"), rewards = range("reward");
    const asksReward = rewards[0] > -Infinity || rewards[1] < Infinity; // a reply may have none
    const text = wanted.text.toLowerCase();
    found = rows.filter((row) => {
      if (outcome >= 0 && row.outcome !== outcome) return false;
      if (source >= 0 && row.source !== source) return false;
      if (run >= 0 && row.run !== run) return false;
      if (wanted.difficulty && String(data.problems[row.problem].difficulty) !== wanted.difficulty) return false;
      if (change >= 0 && row.change !== change) return false;
      if (row.step < steps[0] || row.step > steps[1]) return false;
      if (asksReward && !(row.reward >= rewards[0] && row.reward <= rewards[1])) return false;
      if (wanted.disagree && !row.disagree) return false;
      if (wanted.suspicion && row.suspicion === null) return false;
      if (!text) return true;
      row.lowered ??= (row.text + "\n" + data.problems[row.problem].question).toLowerCase();
      return row.lowered.includes(text);
    });
    count.textContent = found.length.toLocaleString("en") + " of " + rows.length.toLocaleString("en") + " replies";
    list.replaceChildren();
    list.scrollTop = 0;
    shown = 0;
    more();
  }

  function more() {
    const next = found.slice(shown, shown + SHOWN_AT_ONCE);
    for (const row of next) {
      const item = element("div", "item");
      const outcome = data.outcomes[row.outcome];
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", String(row === chosen));
      item.dataset.key = row.key;
      item.id = "item-" + row.number;
      item.append(element("b", "badge " + outcome, outcome), " " + place(row) + ", reward " + number(row.reward));
      const first = element("span", "first");
      appendVisible(first, data.problems[row.problem].question.slice(0, 90));
      item.append(first);
      list.append(item);
    }
    shown += next.length;
  }

  function choose(row, scroll = true) {
    if (!row) return;
    while (shown < found.length && found.indexOf(row) >= shown) more();
    show(row);
    list.setAttribute("aria-activedescendant", "item-" + row.number);
    if (scroll) document.getElementById("item-" + row.number)?.scrollIntoView({ block: "nearest" });
    permalink();
  }

  function permalink() {
    const state = new URLSearchParams();
    for (const [name, value] of new FormData(form)) if (value) state.set(name, value === "on" ? "1" : value);
    if (chosen) state.set("reply", chosen.key);
    if (mode !== "group") state.set("view", mode);
    history.replaceState(null, "", "#replies?" + state);
  }

  function restore() {
    const [place, query] = location.hash.split("?");
    if (place !== "#replies" || !query) return false;
    const state = new URLSearchParams(query);
    for (const control of form.elements) {
      if (!control.name) continue;
      if (control.type === "checkbox") control.checked = state.has(control.name);
      else control.value = state.get(control.name) ?? "";
    }
    mode = state.get("view") === "problem" ? "problem" : "group";
    filter();
    const row = byKey.get(state.get("reply"));
    if (row) choose(row);
    else show(found[0] ?? null);
    if (row) $("replies").scrollIntoView();
    return true;
  }

  function options(name, entries) {
    const select = form.elements[name];
    for (const [value, label] of entries) {
      const option = element("option", "", label);
      option.value = value;
      select.append(option);
    }
  }

  function move(by) {
    const at = found.indexOf(chosen);
    choose(found[at < 0 ? 0 : Math.min(Math.max(at + by, 0), found.length - 1)]);
  }

  const twice = (name) => [name, name];
  options("outcome", data.outcomes.filter((name, at) => rows.some((row) => row.outcome === at)).map(twice));
  options("source", data.sources.map(twice));
  options("run", NAMES.run.map(twice));
  options("change", data.changes.map(twice));
  form.querySelector(".change-filter").hidden = !rows.some((row) => row.change !== null);
  const difficulties = new Set(data.problems.map((one) => one.difficulty).filter((one) => one !== null));
  options("difficulty", [...difficulties].sort((one, other) => one - other).map((one) => [one, String(one)]));
  form.querySelector(".run-filter").hidden = data.runs.length < 2;
  function refilter() {
    filter();
    // The reply beside the list is one of those in it.
    if (chosen === null || !found.includes(chosen)) show(found[0] ?? null);
    permalink();
  }

  form.addEventListener("input", refilter);
  form.addEventListener("reset", () => setTimeout(refilter));
  form.addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("click", (event) => {
    const item = event.target.closest(".item");
    if (item) choose(byKey.get(item.dataset.key), false);
  });
  list.addEventListener("scroll", () => {
    if (list.scrollTop + list.clientHeight > list.scrollHeight - 300 && shown < found.length) more();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, select, textarea");
    if (typing) {
      if (event.key === "Escape") {
        event.preventDefault(); // a search field would empty itself and tell nobody
        event.target.blur();
      }
      return;
    }
    const onList = document.activeElement === list;
    const actions = {
      j: () => move(1), k: () => move(-1), "/": () => form.elements.text.focus(),
      g: () => { mode = "group"; show(chosen); permalink(); },
      p: () => { mode = "problem"; show(chosen); permalink(); },
      ...(onList ? { ArrowDown: () => move(1), ArrowUp: () => move(-1) } : {}),
    };
    if (actions[event.key]) {
      event.preventDefault();
      actions[event.key]();
    }
  });
  window.addEventListener("hashchange", restore);
  const theme = $("theme");
  const root = document.documentElement;
  // What outlives a refresh of the tab: the theme, and which tables are open. A page that is read
  // from a file may have no storage, and forgets.
  const remembered = (name, value) => {
    try {
      if (value !== undefined) sessionStorage.setItem(name, value);
      return sessionStorage.getItem(name) ?? "";
    } catch {
      return "";
    }
  };
  if (["dark", "light"].includes(remembered("theme"))) root.dataset.theme = remembered("theme");
  const tables = [...document.querySelectorAll("details")];
  const changed = remembered(location.pathname).split(" ").filter(Boolean).map(Number);
  const initially = new Map(tables.map((each) => [each, each.open]));
  for (const at of changed) if (tables[at]) tables[at].open = !tables[at].open;
  document.addEventListener("toggle", () => {
    const now = tables.flatMap((each, at) => (each.open === initially.get(each) ? [] : [at]));
    remembered(location.pathname, now.join(" "));
  }, true);
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remembered("theme", root.dataset.theme);
  });
  $("plain").hidden = true;
  $("explorer").hidden = false;
  if (!restore()) {
    filter();
    // Begin with a late group whose replies differ: there is something to see.
    const differs = (group) => new Set(group.map((row) => row.outcome)).size > 1;
    const mixed = [...groups.values()].filter((group) => group.length > 1 && differs(group));
    const first = (mixed.pop() ?? rows)[0];
    show(first);
    while (shown < found.length && found.indexOf(first) >= shown) more();
    list.scrollTop = document.getElementById("item-" + first.number).offsetTop - list.offsetTop;
  }
})();
