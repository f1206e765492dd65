"use strict";
// Shows single replies: filter, sort, page, open one. Every text of the data goes into the page as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const text = (number) => data.texts[number];
  const PAGE = 50;
  const [VARIANT, ENTRY, REPLY, CLASS, MARKS, TOKENS, SECONDS, HASH, FAULTS, FINISH, INDEX] = data.rows[0] ? data.rows[0].keys() : [];
  const SCORERS = ["published", "spanning", "strict"];
  const right = (row, scorer, metric) => Boolean(row[MARKS] & (1 << (3 * scorer + metric)));
  const entryOf = (row) => data.entries[row[ENTRY]];
  const byId = (id) => document.getElementById(id);
  const make = (tag, kind, ...inner) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    made.append(...inner);
    return made;
  };
  const mark = (yes) => make("span", yes ? "yes" : "no", yes ? "✓" : "✗");
  const chip = (number) => make("span", `chip s${number % 8}`, data.variants[number][0]);
  const tag = (row) => {
    const square = make("i", `c-${data.classes[row[CLASS]][0].replaceAll(" ", "_")}`);
    return make("span", "tag", square, data.classes[row[CLASS]][0]);
  };
  const number = new Intl.NumberFormat("en");

  const mixed = new Set(data.entries.map((entry) => entry[1])).size > 1;
  const columns = [
    ["variant", (row) => row[VARIANT], (row) => make("td", "", chip(row[VARIANT]), make("span", "wide", data.variants[row[VARIANT]][1]))],
    ["entry", (row) => row[INDEX], (row) => make("td", "", text(entryOf(row)[0]))],
    ...(mixed ? [["setting", (row) => text(entryOf(row)[1]), (row) => make("td", "wide", text(entryOf(row)[1])), "wide"]] : []),
    ["right tool", (row) => text(entryOf(row)[2]), (row) => make("td", "tool", text(entryOf(row)[2]))],
    ["class", (row) => row[CLASS], (row) => make("td", "", tag(row))],
    ["tool", (row) => right(row, 0, 0), (row) => make("td", "", mark(right(row, 0, 0)))],
    ["param.", (row) => right(row, 0, 1), (row) => make("td", "", mark(right(row, 0, 1)))],
    ["strict", (row) => right(row, 2, 2), (row) => make("td", "wide", mark(right(row, 2, 2))), "wide"],
    ["tokens", (row) => row[TOKENS], (row) => make("td", "num wide", row[TOKENS] ? number.format(row[TOKENS]) : "–"), "num wide"],
    ["history", (row) => entryOf(row)[6], (row) => make("td", "num wide", String(entryOf(row)[6])), "num wide"],
    ["equals", (row) => entryOf(row)[5].length, (row) => make("td", "num wide", String(entryOf(row)[5].length)), "num wide"],
    ["s", (row) => row[SECONDS], (row) => make("td", "num wide", row[SECONDS] ? row[SECONDS].toFixed(2) : "–"), "num wide"],
  ];

  const ofEntry = new Map();
  for (const row of data.rows) {
    if (!ofEntry.has(row[ENTRY])) ofEntry.set(row[ENTRY], []);
    ofEntry.get(row[ENTRY]).push(row);
  }
  const differing = new Set();
  for (const [entry, rows] of ofEntry) if (rows.some((row) => row[CLASS] !== rows[0][CLASS])) differing.add(entry);
  const haystack = (row) => {
    const entry = entryOf(row);
    return `${text(entry[0])}\n${text(entry[2])}\n${text(entry[3])}\n${text(row[REPLY])}`.toLowerCase();
  };

  const state = { sort: 1, down: false, page: 0 };
  const chosen = () => {
    const variant = byId("f-variant").value, kind = byId("f-class").value;
    const wanted = byId("f-text").value.trim().toLowerCase(), differ = byId("f-differ").checked;
    const found = data.rows.filter((row) =>
      (variant === "" || row[VARIANT] === Number(variant)) &&
      (kind === "" || (kind === "wrong" ? row[CLASS] > 0 : row[CLASS] === Number(kind))) &&
      (!differ || differing.has(row[ENTRY])) &&
      (!wanted || haystack(row).includes(wanted)));
    const key = columns[state.sort][1], turn = state.down ? -1 : 1;
    const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
    return found.sort((a, b) => turn * order(key(a), key(b)) || order(a[INDEX], b[INDEX]) || a[VARIANT] - b[VARIANT]);
  };

  const item = (list, name, ...inner) => list.append(make("dt", "", name), make("dd", "", ...inner));
  const pre = (content) => make("pre", "", content);
  const verdict = (row) => SCORERS.map((name, scorer) =>
    `${name}: ${["tool", "parameters", "both"].map((metric, at) => `${metric} ${right(row, scorer, at) ? "right" : "wrong"}`).join(", ")}`).join("\n");
  const offered = (entry) => {
    const same = new Set(entry[5]), list = make("ul", "");
    for (const name of entry[4]) {
      const what = name === entry[2] ? " — the right one" : same.has(name) ? " — same job" : "";
      list.append(make("li", "", name === entry[2] ? make("b", "", text(name)) : text(name), what));
    }
    return list;
  };
  const detail = (row) => {
    const entry = entryOf(row), list = make("dl", "");
    const place = `entry ${text(entry[0])}, number ${row[INDEX] + 1} of the data, ${text(entry[1])} setting, ${number.format(row[TOKENS])} tokens`;
    item(list, "prompt", place + (text(row[HASH]) ? `, SHA-256 ${text(row[HASH])}…` : ""));
    item(list, "gold", pre(`{"tool_name": ${JSON.stringify(text(entry[2]))}, "parameters": ${text(entry[3])}}`));
    item(list, `reply (${text(row[FINISH]) || "none"})`, pre(text(row[REPLY])));
    item(list, "verdict", pre(`${data.classes[row[CLASS]][0]}: ${data.classes[row[CLASS]][1]}\n${verdict(row)}`));
    if (row[FAULTS].length) item(list, "parameters", pre(row[FAULTS].map(text).join("\n")));
    const liked = entry[7] < 0 ? "never rated" : `liked in ${Math.round(100 * entry[7])} % of its ratings`;
    item(list, "history", `${entry[6]} calls; the right provider was ${liked}`);
    item(list, "offered", offered(entry));
    for (const other of ofEntry.get(row[ENTRY])) {
      if (other === row) continue;
      const name = make("span", "", chip(other[VARIANT]), tag(other));
      item(list, data.variants[other[VARIANT]][1], name, other[REPLY] === row[REPLY] ? make("small", "", " the same reply") : pre(text(other[REPLY])));
    }
    const cell = make("td", "", list);
    cell.colSpan = columns.length;
    return make("tr", "detail", cell);
  };

  const toggle = (line, row) => {
    const open = line.nextSibling && line.nextSibling.className === "detail";
    if (open) line.nextSibling.remove(); else line.after(detail(row));
    line.setAttribute("aria-expanded", String(!open));
  };
  const lineOf = (row) => {
    const line = make("tr", "row", ...columns.map((column) => column[2](row)));
    line.tabIndex = 0;
    line.setAttribute("aria-expanded", "false");
    line.onclick = () => toggle(line, row);
    line.onkeydown = (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      toggle(line, row);
    };
    return line;
  };
  const head = () => make("thead", "", make("tr", "", ...columns.map(([name, , , kind], at) => {
    const button = make("button", "", name), cell = make("th", kind || "", button);
    if (at === state.sort) cell.ariaSort = state.down ? "descending" : "ascending";
    button.onclick = () => {
      state.down = at === state.sort && !state.down;
      state.sort = at;
      draw(true);
    };
    return cell;
  })));
  const step = (name, by, possible) => {
    const button = make("button", "", name);
    button.disabled = !possible;
    button.onclick = () => { state.page += by; draw(false); };
    return button;
  };
  const draw = (first) => {
    if (first) state.page = 0;
    const found = chosen(), start = state.page * PAGE, shown = found.slice(start, start + PAGE);
    byId("browse").replaceChildren(head(), make("tbody", "", ...shown.map(lineOf)));
    const range = found.length ? `${number.format(start + 1)}–${number.format(start + shown.length)} of ${number.format(found.length)} replies` : "no reply like that";
    byId("pager").replaceChildren(range, step("Back", -1, start > 0), step("Next", 1, start + PAGE < found.length));
  };
  const option = (value, name) => {
    const made = make("option", "", name);
    made.value = value;
    return made;
  };

  byId("f-variant").append(option("", "all"), ...data.variants.map(([letter, name], at) => option(String(at), `${letter}  ${name}`)));
  const used = new Set(data.rows.map((row) => row[CLASS]));
  byId("f-class").append(option("", "all"), option("wrong", "all but right"), ...data.classes.flatMap(([name], at) => (used.has(at) ? [option(String(at), name)] : [])));
  for (const id of ["f-variant", "f-class", "f-differ"]) byId(id).onchange = () => draw(true);
  byId("f-text").oninput = () => draw(true);
  byId("filters").hidden = false;
  draw(true);
})();
