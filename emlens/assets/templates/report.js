"use strict";
// Draws the figures in the colours of the reader's scheme, and tells of the token pointed at.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themes = read("themes");
  const settings = { displayModeBar: false, responsive: true };

  function recolour(trace, scheme) {
    for (const part of [trace.line, trace.marker, trace.error_x, trace.error_y]) {
      const place = part ? themes.light.layout.colorway.indexOf(part.color) : -1;
      if (place >= 0) part.color = themes[scheme].layout.colorway[place];
    }
  }

  // A printed page does not tell its width in time: these are pixels that A4 and Letter have.
  const printed = (place) => ({ width: place.closest(".grid") ? 320 : 660, autosize: false });

  function draw(scheme, size = () => ({})) {
    for (const place of document.querySelectorAll(".plot")) {
      const figure = read(place.id + "-data");
      figure.data.forEach((trace) => recolour(trace, scheme));
      const layout = { ...figure.layout, template: themes[scheme], ...size(place) };
      Plotly.react(place, figure.data, layout, settings);
    }
  }
  const drawOnScreen = () => draw(dark.matches ? "dark" : "light");
  drawOnScreen();
  dark.addEventListener("change", drawOnScreen);
  addEventListener("beforeprint", () => draw("light", printed));
  addEventListener("afterprint", drawOnScreen);

  // Tables that a click on a heading sorts; what is no number stands last, either way round.
  const key = (cell) => (cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v));
  function order(a, b, sign) {
    if (typeof a === typeof b) return sign * (a < b ? -1 : Number(a > b));
    return typeof a === "number" ? -1 : 1;
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest && event.target.closest(".sortable th button");
    if (!button) return;
    const head = button.closest("th"), body = button.closest("table").tBodies[0];
    const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const place = head.cellIndex;
    const rows = [...body.rows].map((made) => [key(made.cells[place]), made]);
    rows.sort((a, b) => order(a[0], b[0], sign));
    body.append(...rows.map((pair) => pair[1]));
  });

  const tip = document.getElementById("tip");
  const details = new Map();
  let current = null;

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function row(cells) {
    const made = element("tr");
    for (const [text, className] of cells) made.append(element("td", text, className));
    return made;
  }

  function fill([token, kl, back, entropy, base, tuned]) {
    const facts = element("p", undefined, "facts");
    for (const [label, value] of [
      ["KL(base‖tuned) ", kl], ["KL(tuned‖base) ", back], ["entropy ", entropy],
    ]) {
      if (facts.childNodes.length) facts.append(" · ");
      facts.append(label, element("b", value));
    }
    facts.append(" nats");
    const table = element("table");
    const head = element("tr");
    for (const name of ["base expected", "tuned expected"]) {
      const cell = element("th", name);
      cell.colSpan = 2;
      head.append(cell);
    }
    table.append(head);
    const percent = (p) => (100 * p).toFixed(1) + " %";
    for (let i = 0; i < Math.max(base.length, tuned.length); i += 1) {
      table.append(row([base[i], tuned[i]].flatMap(
        (likely) => [[likely ? percent(likely[1]) : "", "n"], [likely ? likely[0] : "", ""]])));
    }
    tip.replaceChildren(element("p", token, "head"), facts, table);
  }

  function hide() {
    tip.hidden = true;
    if (current) current.classList.remove("on");
    current = null;
  }

  function show(token) {
    const box = token.closest(".tokens");
    if (!details.has(box.id)) details.set(box.id, read(box.id + "-data"));
    hide();
    current = token;
    token.classList.add("on");
    fill(details.get(box.id)[[...box.children].indexOf(token)]);
    tip.hidden = false;
    const at = token.getClientRects()[0] || token.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(at.left, width - tip.offsetWidth - 8));
    const below = at.bottom + tip.offsetHeight + 12 < innerHeight;
    const top = below ? at.bottom + 6 : Math.max(8, at.top - tip.offsetHeight - 6);
    tip.style.left = left + scrollX + "px";
    tip.style.top = top + scrollY + "px";
  }

  function step(box, key) {
    const tokens = [...box.children];
    const counted = tokens.findIndex((token) => token.classList.contains("c"));
    const here = current && current.parentElement === box ? tokens.indexOf(current) : -1;
    const moves = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 };
    if (!(key in moves)) return false;
    const next = here < 0 ? Math.max(counted, 0) : moves[key];
    if (tokens[next]) show(tokens[next]);
    return true;
  }

  const tokenAt = (event) => event.target.closest && event.target.closest(".tokens > .t");
  document.addEventListener("pointerover", (event) => {
    const token = tokenAt(event);
    if (token) show(token);
    else if (event.pointerType === "mouse" && !tip.contains(event.target)) hide();
  });
  document.addEventListener("click", (event) => {
    const token = tokenAt(event);
    if (token) show(token);
    else if (!tip.contains(event.target)) hide();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const box = event.target.closest && event.target.closest(".tokens");
    if (box && step(box, event.key)) event.preventDefault();
  });
  document.addEventListener("focusout", (event) => {
    if (event.target.classList.contains("tokens")) hide();
  });
})();
