"use strict";
// Every string of the run reaches the page as text (textContent, attributes), never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const VERDICTS = ["kept", "relabelled", "removed"];

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter(child => child !== null));
  return node;
}

function draw(parent, tag, attributes, text) {
  const node = parent.appendChild(document.createElementNS(SVG, tag));
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const count = n => n.toLocaleString("en");
const plural = (n, what) => `${count(n)} ${what}${n === 1 ? "" : "s"}`;
const percent = (part, whole) => whole ? `${(100 * part / whole).toFixed(1)} %` : "–";
const number = v => v === null ? "–" : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en")
  : v !== 0 && Math.abs(v) < 0.001 ? v.toExponential(2) : String(+v.toPrecision(4));
const color = i => `var(--c${i % 6})`;

function className(c) {
  if (c < 0) return "no label";
  return data.names && data.names[c] !== String(c) ? `${c} ${data.names[c]}` : String(c);
}

function absent(section, otherwise, ...names) {
  // The section's place is taken by the first reason there is among data.missing[names].
  const name = names.find(one => one in data.missing);
  const text = `Not shown: ${name ? data.missing[name] : otherwise}.`;
  for (const node of [...$(section).children].slice(1)) node.hidden = true;
  $(section).append(make("p", {className: "note", textContent: text}));
}

// Charts.

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(f => f * power >= rough * 0.999);
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(+(i * step).toPrecision(12));
  return values;
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

function chart(spec) {
  const unit = spec.unit || "", shown = spec.lines.map(() => true);
  const readout = make("p", {className: "readout"});
  readout.setAttribute("aria-live", "polite");
  const legend = make("div", {className: "legend"});
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("tabindex", "0");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${spec.title}, chart over epochs; arrow keys read its values`);
  spec.lines.forEach((line, i) => {
    line.color = spec.stacked ? `var(--${line.name})` : color(i);
    if (spec.lines.length === 1) return;
    const item = make("button", {type: "button", textContent: line.name, disabled: Boolean(spec.stacked)});
    item.style.setProperty("--color", line.color);
    item.setAttribute("aria-pressed", "true");
    item.onclick = () => { shown[i] = !shown[i]; item.setAttribute("aria-pressed", shown[i]); redraw(); };
    legend.append(item);
  });
  const figure = make("figure", {}, make("h3", {textContent: spec.title}),
    make("small", {textContent: spec.about}), legend, svg, readout);

  const all = spec.lines.flatMap(line => line.x);
  const xs = [...new Set(all)].sort((a, b) => a - b);
  let x0 = Math.min(0, xs[0]), x1 = xs[xs.length - 1] || 1;
  let scale, at = null, cursor;

  // Stacked: each line stands on those before it.
  const base = spec.lines.map((line, i) => line.y.map((_, j) =>
    spec.stacked ? spec.lines.slice(0, i).reduce((sum, other) => sum + (other.y[j] || 0), 0) : 0));

  function redraw() {
    const width = svg.clientWidth || 400, height = svg.clientHeight || 240;
    const left = 46, right = 8, top = 18, bottom = 26;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    let low = 0, high = 100;
    if (!spec.stacked) {
      const values = spec.lines.flatMap((line, i) => shown[i] ? [...line.y, ...(line.low || []), ...(line.high || [])] : []);
      const finite = values.filter(v => v !== null);
      [low, high] = finite.length ? [Math.min(...finite), Math.max(...finite)] : [0, 1];
      [low, high] = [Math.min(0, low), Math.max(0, high)];
      if (low === high) high = 1;
      high = unit === " %" && high > 90 ? 100 : high + (high - low) / 20;
    }
    const sx = x => left + (x - x0) / (x1 - x0) * (width - left - right);
    const sy = y => height - bottom - (y - low) / (high - low) * (height - top - bottom);
    scale = {left, right, width, sx, sy};
    for (const y of ticks(low, high, 4)) {
      draw(svg, "line", {class: "grid", x1: left, x2: width - right, y1: sy(y), y2: sy(y)});
      draw(svg, "text", {x: left - 6, y: sy(y) + 4, "text-anchor": "end"}, number(y) + unit.trim());
    }
    ticks(x0, x1, Math.max(2, width / 110)).forEach((x, i) =>
      draw(svg, "text", {x: sx(x), y: height - 8, "text-anchor": "middle"}, i ? number(x) : `epoch ${number(x)}`));
    if (spec.mark !== undefined && spec.mark > x0 && spec.mark < x1) {
      draw(svg, "line", {class: "mark", x1: sx(spec.mark), x2: sx(spec.mark), y1: top, y2: height - bottom});
      const end = sx(spec.mark) > width * 0.6;
      draw(svg, "text", {x: sx(spec.mark) + (end ? -4 : 4), y: top - 4, "text-anchor": end ? "end" : "start"}, "correction begins");
    }
    spec.lines.forEach((line, i) => {
      if (!shown[i]) return;
      const runs = [[]];  // a value that is not finite interrupts the line
      line.y.forEach((y, j) => y === null ? runs.push([]) : runs[runs.length - 1].push(j));
      for (const run of runs.filter(r => r.length)) {
        const path = (values, indices) => indices.map(j => `${sx(line.x[j]).toFixed(1)},${sy(values(j)).toFixed(1)}`).join("L");
        const back = [...run].reverse(), up = j => line.y[j] + base[i][j];
        if (spec.stacked) {
          draw(svg, "path", {d: `M${path(up, run)}L${path(j => base[i][j], back)}Z`}).style.fill = line.color;
          if (run.length > 1) continue;
        } else if (line.low) {
          draw(svg, "path", {class: "band", d: `M${path(j => line.high[j] ?? line.y[j], run)}L${path(j => line.low[j] ?? line.y[j], back)}Z`})
            .style.fill = line.color;
        }
        draw(svg, "path", {class: "line", d: `M${path(up, run)}`}).style.stroke = line.color;
        if (run.length === 1) draw(svg, "circle", {cx: sx(line.x[run[0]]), cy: sy(up(run[0])), r: 3}).style.fill = line.color;
      }
    });
    cursor = draw(svg, "g", {});
    if (at !== null) point(at);
  }

  function point(i) {
    at = Math.max(0, Math.min(xs.length - 1, i));
    cursor.replaceChildren();
    const parts = [];
    draw(cursor, "line", {class: "mark", x1: scale.sx(xs[at]), x2: scale.sx(xs[at]), y1: 18, y2: svg.clientHeight - 26});
    spec.lines.forEach((line, k) => {
      if (!shown[k]) return;
      const j = nearest(line.x, xs[at]);
      parts.push(`${line.name} ${number(line.y[j])}${unit}`);
      if (line.y[j] !== null)
        draw(cursor, "circle", {cx: scale.sx(line.x[j]), cy: scale.sy(line.y[j] + base[k][j]), r: 3.5}).style.fill = line.color;
    });
    readout.textContent = `epoch ${+xs[at].toFixed(2)}: ${parts.join(" · ")}`;
  }

  svg.onpointermove = event => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    point(nearest(xs, x0 + (x - scale.left) / (scale.width - scale.left - scale.right) * (x1 - x0)));
  };
  svg.onkeydown = event => {
    const move = {ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity}[event.key];
    if (move === undefined) return;
    event.preventDefault();
    point((at ?? (move > 0 ? -1 : xs.length)) + move);
  };
  new ResizeObserver(redraw).observe(svg);
  return figure;
}

function showCharts(section, ...names) {
  const specs = data.charts.filter(spec => spec.group === section);
  if (!specs.length) return absent(section, "nothing was logged yet", ...names);
  for (const spec of specs) {
    if (data.summary.start_clean !== null && section !== "speed") spec.mark = data.summary.start_clean;
    $(section).querySelector(".charts").append(chart(spec));
  }
}

// Tables.

function head(table, columns, sort) {
  const row = table.createTHead().insertRow();
  columns.forEach(([title, text], i) => {
    const cell = row.appendChild(make("th", {scope: "col", className: text ? "text" : ""}));
    if (sort && title) cell.append(make("button", {type: "button", textContent: title, onclick: () => sort(i)}));
    else cell.textContent = title;
  });
  return row.cells;
}

function fill(body, rows) {
  for (const values of rows) {
    const row = body.insertRow();
    for (const value of values) {
      const cell = row.insertCell();
      if (value instanceof Node) cell.append(value);
      else cell.textContent = value;
      if (body.parentNode.tHead.rows[0].cells[cell.cellIndex].className) cell.className = "text";
    }
  }
}

function pages(button, first) {
  // How many to show: `first`, until the button asks for all. -> limit(found, redraw)
  let all = false;
  return (found, redraw) => {
    button.hidden = all || found <= first;
    button.textContent = `Show all ${count(found)}`;
    button.onclick = () => { all = true; redraw(); };
    return all ? Infinity : first;
  };
}

function bar(parts, whole) {  // the numbers stand beside it
  const box = make("div", {className: "bar"});
  box.setAttribute("aria-hidden", "true");
  for (const [verdict, n] of parts) {
    const part = box.appendChild(make("i"));
    part.style.width = `${100 * n / whole}%`;
    part.style.background = `var(--${verdict})`;
  }
  return box;
}

function sortedTable(prefix, columns, by, rows) {
  // columns: [title, whether it is text, what to sort by, what to show]: of a class, both functions; by: a column's place.
  const table = $(`${prefix}-table`), shown = {column: by, down: by !== 0}, limit = pages($(`${prefix}-more`), 25);
  const texts = new Map(rows.map(i => [i, className(i).toLowerCase()]));
  const cells = head(table, columns, column => {
    shown.down = column === shown.column ? !shown.down : column !== 0;
    shown.column = column;
    update();
  });
  const body = table.createTBody();
  function update() {
    const wanted = $(`${prefix}-search`).value.trim().toLowerCase();
    const found = rows.filter(i => texts.get(i).includes(wanted));
    const value = columns[shown.column][2], last = shown.down ? -1 : 2e9;
    const key = i => { const v = value(i); return v === null || Number.isNaN(v) ? last : v; };
    found.sort((a, b) => (shown.down ? -1 : 1) * (key(a) - key(b)) || a - b);
    [...cells].forEach((cell, i) => i === shown.column
      ? cell.setAttribute("aria-sort", shown.down ? "descending" : "ascending") : cell.removeAttribute("aria-sort"));
    body.replaceChildren();
    fill(body, found.slice(0, limit(found.length, update)).map(i => columns.map(column => column[3](i))));
    $(`${prefix}-count`).textContent = found.length === rows.length ? `${count(rows.length)} classes`
      : `${count(found.length)} of ${count(rows.length)} classes`;
  }
  $(`${prefix}-search`).oninput = update;
  update();
}

function classTable() {
  const {images, relabelled, removed, joined} = data.labels.classes, noisy = i => relabelled[i] + removed[i];
  const share = (title, part) => [title, false, i => part(i) / images[i], i => percent(part(i), images[i])];
  sortedTable("class", [
    ["class", true, i => i, className], share("noise rate", noisy),
    ["", true, null, i => images[i] ? bar([["relabelled", relabelled[i]], ["removed", removed[i]]], images[i]) : ""],
    ["images", false, i => images[i], i => count(images[i])],
    share("relabelled", i => relabelled[i]), share("removed", i => removed[i]),
    ["joined from others", false, i => joined[i], i => count(joined[i])], ["", true, null, i => showButton({given: i})],
  ], 1, [...images.keys()]);
}

function pairTable() {
  const {pairs, classes} = data.labels, table = $("pair-table");
  if (!pairs.length) return absent("relabellings", "no label was changed");
  head(table, [["given label", true], ["new label", true], ["images", false], ["of the given class", false], ["", true], ["", true]]);
  const body = table.createTBody(), limit = pages($("pair-more"), 15);
  function update() {
    body.replaceChildren();
    fill(body, pairs.slice(0, limit(pairs.length, update)).map(([given, now, n]) => {
      const whole = given < 0 ? data.labels.unlabelled : classes.images[given];
      return [className(given), className(now), count(n), percent(n, whole),
        bar([["relabelled", n]], pairs[0][2]), showButton({given, new: now})];
    }));
  }
  update();
}

// Images.

const filters = {search: "", verdict: "", given: "", new: "", order: ""};

function showButton(wanted) {
  const of = [wanted.given, wanted.new];
  const n = data.images.filter(one => one.given === of[0] && (of[1] === undefined || one.new === of[1])).length;
  if (!n) return "";
  return make("button", {type: "button", textContent: `${plural(n, "image")} below`, onclick: () => {
    resetFilters();
    for (const [name, value] of Object.entries(wanted)) $(name).value = value;
    $("given").dispatchEvent(new Event("input", {bubbles: true}));
    $("images").scrollIntoView();
    $("given").focus({preventScroll: true});
  }});
}

function resetFilters() {
  for (const name of Object.keys(filters)) $(name).value = "";
}

const verdictOf = one => one.new === -1 ? "removed" : one.new === one.given ? "kept" : "relabelled";

function picture(one) {
  const image = make("img", {alt: "", src: `data:image/jpeg;base64,${one.jpeg}`});
  image.onload = () => image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) < data.thumb);
  return image;
}

function cardSize(box) {
  box.style.setProperty("--thumb", `${data.thumb}px`);
  box.style.setProperty("--card-width", `${Math.max(data.thumb + 16, 140)}px`);
}

function card(one) {
  const verdict = verdictOf(one);
  const title = make("strong");
  const given = className(one.given);
  if (verdict === "relabelled") title.append(make("del", {textContent: given}), ` → ${className(one.new)}`);
  else title.append(given);
  const {given: own, new: now, best, ...others} = one.scores, lines = [];
  if (own !== undefined) lines.push(`given label scores ${own.toFixed(3)}`);
  if (verdict === "relabelled" && now !== undefined) lines.push(`new label scores ${now.toFixed(3)}`);
  if (best !== undefined && "best" in one && one.best !== one.given && one.best !== one.new)
    lines.push(`${className(one.best)} scores ${best.toFixed(3)}`);
  for (const [name, value] of Object.entries(others)) lines.push(`${name.replaceAll("_", " ")} ${value.toFixed(3)}`);
  if ("now" in one && one.now !== one.new) lines.push(one.now === -1 ? "would be removed now" : `would get ${className(one.now)} now`);
  const node = make("figure", {className: `verdict-${verdict}`}, picture(one),
    make("figcaption", {}, title, make("b", {textContent: verdict}), ...lines.map(text => make("small", {textContent: text})), make("small", {textContent: one.path})));
  node.dataset.verdict = verdict;
  return node;
}

function gallery() {
  const nodes = data.images.map(one => ({one, node: null, verdict: verdictOf(one),
    text: `${one.path}\n${className(one.given)}\n${className(one.new)}`.toLowerCase()}));
  const box = $("gallery"), limit = pages($("image-more"), 60);
  cardSize(box);
  for (const verdict of VERDICTS) {
    const n = nodes.filter(item => item.verdict === verdict).length;
    if (n) $("verdict").append(make("option", {value: verdict, textContent: `${verdict} (${n})`}));
  }
  for (const name of ["given", "new"]) {
    const classes = new Map();
    for (const {one} of nodes) classes.set(one[name], (classes.get(one[name]) || 0) + 1);
    for (const [c, n] of [...classes].sort((a, b) => a[0] - b[0])) {
      if (name === "new" && c < 0) continue;
      $(name).append(make("option", {value: c, textContent: `${className(c)} (${n})`}));
    }
  }
  const names = [...new Set(data.images.flatMap(one => Object.keys(one.scores)))];
  $("order").append(make("option", {value: "", textContent: "as sampled"}));
  for (const name of names) {
    const words = ["given", "new", "best"].includes(name) ? `score of the ${name} label` : name.replaceAll("_", " ");
    for (const [sign, way] of [["-", "highest"], ["+", "lowest"]])
      $("order").append(make("option", {value: sign + name, textContent: `${words}, ${way} first`}));
  }
  function update() {
    for (const name of Object.keys(filters)) filters[name] = $(name).value;
    const wanted = filters.search.trim().toLowerCase();
    const found = nodes.filter(({one, verdict, text}) => text.includes(wanted)
      && (!filters.verdict || verdict === filters.verdict)
      && ["given", "new"].every(name => filters[name] === "" || String(one[name]) === filters[name]));
    const key = filters.order.slice(1), sign = filters.order[0] === "+" ? 1 : -1;
    const value = item => item.one.scores[key] ?? sign * 2;  // without this score: last
    if (key) found.sort((a, b) => sign * (value(a) - value(b)));
    box.replaceChildren(...found.slice(0, limit(found.length, update)).map(item => item.node ??= card(item.one)));
    $("image-count").textContent = found.length === nodes.length ? plural(found.length, "image")
      : `${count(found.length)} of ${plural(nodes.length, "image")}`;
  }
  document.querySelector("#images .controls").addEventListener("input", update);
  $("reset").onclick = () => { resetFilters(); update(); };
  update();
}

function imagesAbout() {
  const scored = data.images.some(one => "now" in one);
  const all = Object.values(data.labels.counts).reduce((a, b) => a + b, 0);
  $("images-about").textContent = `A random sample of ${plural(data.images.length, "image")} out of ${count(all)}, all verdicts and classes in turn. `
    + `The verdict is that of ${data.labels.source}. `
    + (scored ? "The scores are the mixture of classifier and prototypes that decides, by the newest checkpoint and on the central crop; "
      + "training saw random crops, so it may have decided otherwise: then the card says what the checkpoint would do now. " : "") + "More of a class: mopro-fast report --only CLASS.";
  unreadList("images-about", data.unread);
}

function unreadList(before, unread) {
  const entries = Object.entries(unread);
  if (!entries.length) return;
  const list = make("ul", {}, ...entries.slice(0, 50).map(([path, why]) => make("li", {textContent: `${path}: ${why}`})));
  $(before).after(make("details", {}, make("summary", {textContent: `${plural(entries.length, "sampled image")} could not be read`}), list));
}

// Anchors.

const decided = one => !("now" in one) || one.now < -1 ? "" : one.now === -1 ? "removed" : one.now === one.given ? "kept" : "relabelled";

function anchorCard(one) {
  const verdict = decided(one), {given: own, best} = one.scores, lines = [];
  const said = {kept: "model: keep it", removed: "model: remove it", relabelled: `model: ${className(one.now)}`, "": "not judged"};
  const values = [["distance", one.dist], ["similarity", one.sim], ["given label scores", own],
    [`${"best" in one ? className(one.best) : "best"} scores`, one.best === one.given ? undefined : best]];
  for (const [name, value] of values) if (value !== undefined) lines.push(`${name} ${number(value)}`);
  if (one.new === -2) lines.push(`not shown in ${data.labels.source}`);
  return make("figure", {className: verdict && `verdict-${verdict}`}, picture(one), make("figcaption", {},
    make("strong", {textContent: className(one.given)}), data.anchors.judge ? make("b", {textContent: said[verdict]}) : null,
    "text" in one ? one.text ? make("q", {textContent: one.text, dir: "auto"}) : make("small", {textContent: "no text"}) : null,
    ...lines.map(text => make("small", {textContent: text})), make("small", {textContent: one.path})));
}

function anchors() {
  const {classes, cards, judge, file} = data.anchors, {anchors: n, images, relabelled, removed} = classes;
  const sum = values => values.reduce((a, b) => a + b, 0), judged = sum(images), all = sum(n);
  const of = (title, values, show) => [title, false, i => values[i], i => show(values[i])];
  const share = (title, part) => [title, false, i => part[i] / images[i], i => percent(part[i], images[i])];
  const inClass = i => cards.filter(one => one.given === i).length;
  const columns = [["class", true, i => i, className], of("anchors", n, count)];
  if (classes.nearest) columns.push(of("nearest", classes.nearest, number), of("farthest", classes.farthest, number),
    of("median image", classes.median, number));
  if (judged) columns.push(of("judged", images, count), share("model would change", relabelled), share("model would remove", removed));
  columns.push(["", true, null, i => inClass(i) ? make("button", {type: "button", textContent: `${plural(inClass(i), "anchor")} below`,
    onclick: () => {
      $("anchor-given").value = i;
      $("anchor-verdict").value = "";
      update();
      $("anchor-gallery").scrollIntoView();
      $("anchor-given").focus({preventScroll: true});
    }}) : ""]);
  sortedTable("anchor-class", columns, judged ? columns.length - 3 : 0, [...n.keys()]);

  $("anchors-about").textContent = `${plural(all, "anchor")} in ${count(n.filter(Boolean).length)} of ${count(n.length)} classes, of ${file}. `
    + "Training keeps an anchor's label whatever the model says. "
    + (judged ? `What it says, by ${judge}: of ${plural(judged, "anchor")} judged it would change the label of ${percent(sum(relabelled), judged)} `
      + `and remove ${percent(sum(removed), judged)}. ` : "No model says yet what it would do with them. ")
    + (classes.nearest ? "Distances are the table's: from the text of the class, of its nearest and its farthest anchor and of its median image. " : "")
    + `Below: ${plural(cards.length, "anchor")} of ${count(new Set(cards.map(one => one.given)).size)} classes, in each from the nearest `
    + "to the farthest at even steps. More of a class: mopro-fast report --only CLASS.";
  unreadList("anchors-about", data.anchors.unread);

  const nodes = cards.map(one => ({one, node: null})), limit = pages($("anchor-more"), 60);
  cardSize($("anchor-gallery"));
  for (const i of new Set(cards.map(one => one.given)))
    $("anchor-given").append(make("option", {value: i, textContent: `${className(i)} (${inClass(i)})`}));
  for (const verdict of VERDICTS) {
    const found = cards.filter(one => decided(one) === verdict).length;
    if (found) $("anchor-verdict").append(make("option", {value: verdict, textContent: `${verdict} (${found})`}));
  }
  function update() {
    const [given, verdict] = [$("anchor-given").value, $("anchor-verdict").value];
    const found = nodes.filter(({one}) => (!given || String(one.given) === given) && (!verdict || decided(one) === verdict));
    $("anchor-gallery").replaceChildren(...found.slice(0, limit(found.length, update)).map(item => item.node ??= anchorCard(item.one)));
    $("anchor-count").textContent = found.length === nodes.length ? plural(found.length, "anchor")
      : `${count(found.length)} of ${plural(nodes.length, "anchor")}`;
  }
  $("anchor-given").oninput = $("anchor-verdict").oninput = update;
  update();
}

// Prototypes.

const RAMP = [[0, 32, 76], [68, 78, 108], [124, 123, 120], [187, 173, 108], [255, 234, 70]];  // cividis

function ramp(v) {
  const t = Math.max(0, Math.min(1, v)) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(t));
  return RAMP[i].map((a, k) => Math.round(a + (t - i) * (RAMP[i + 1][k] - a)));
}

function paint(canvas, width, height, value) {
  Object.assign(canvas, {width, height});
  const context = canvas.getContext("2d"), pixels = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) pixels.data.set([...ramp(value(i)), 255], 4 * i);
  context.putImageData(pixels, 0, 0);
}

function prototypes() {
  const p = data.prototypes, n = p.edges.length - 1;
  const cosines = Int8Array.from(atob(p.cosines), c => c.charCodeAt(0) << 24 >> 24);
  const others = [...cosines].filter((_, i) => n === 1 || i % (n + 1));
  const low = others.reduce((a, b) => Math.min(a, b)), high = Math.max(low + 1, others.reduce((a, b) => Math.max(a, b)));
  const rowName = i => {
    const members = p.order.slice(p.edges[i], p.edges[i + 1]);
    const some = members.slice(0, 3).map(className).join(", ");
    return members.length > 3 ? `${some} and ${members.length - 3} more` : some;
  };
  const single = n === p.order.length;
  $("prototypes-about").textContent = "Cosine similarity of the class prototypes, similar classes side by side. Bright off the diagonal: "
    + "classes that the model hardly tells apart, or whose images are mixed up on the web."
    + (single ? "" : ` ${count(p.order.length)} classes in ${n} groups of neighbours: a cell is the mean over its classes.`)
    + (p.unused ? ` ${plural(p.unused, "prototype")} without any image yet are left out.` : "");
  const canvas = make("canvas", {tabIndex: 0}), readout = make("p", {className: "readout"});
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Map of the prototypes' similarity; arrow keys read its values");
  readout.setAttribute("aria-live", "polite");
  paint(canvas, n, n, i => (cosines[i] - low) / (high - low));
  let [row, column] = [0, 0];
  const say = () => {
    readout.textContent = `${rowName(row)} · ${rowName(column)}: ${(cosines[row * n + column] / 127).toFixed(2)}`;
  };
  canvas.onpointermove = event => {
    const box = canvas.getBoundingClientRect();
    const cell = (at, start, size) => Math.max(0, Math.min(n - 1, Math.floor((at - start) / size * n)));
    [row, column] = [cell(event.clientY, box.top, box.height), cell(event.clientX, box.left, box.width)];
    say();
  };
  canvas.onkeydown = event => {
    const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (!move) return;
    event.preventDefault();
    [row, column] = [row + move[0], column + move[1]].map(v => Math.max(0, Math.min(n - 1, v)));
    say();
  };
  const scale = make("canvas");
  paint(scale, 64, 1, i => i / 63);
  const map = document.querySelector("#prototypes .map");
  if (n <= 40) map.append(make("ol", {}, ...[...Array(n).keys()].map(i => make("li", {textContent: rowName(i), title: rowName(i)}))));
  if (n <= 20) {
    const below = make("ol", {className: "below"}, ...[...Array(n).keys()].map(i => make("li", {textContent: p.order[i]})));
    map.append(canvas, below);
  } else map.append(canvas);
  map.append(make("div", {className: "scale"}, (low / 127).toFixed(2), scale, `${(high / 127).toFixed(2)}`), readout);
  if (!p.pairs.length) return;
  head($("similar-table"), [["most similar", true], ["", true], ["cosine", false]]);
  const body = $("similar-table").createTBody(), limit = pages($("similar-more"), 10);
  function update() {
    body.replaceChildren();
    fill(body, p.pairs.slice(0, limit(p.pairs.length, update)).map(([a, b, cosine]) => [className(a), className(b), cosine.toFixed(3)]));
  }
  update();
}

// The rest.

function tiles() {
  const s = data.summary, box = $("tiles");
  const tile = (value, text) => box.append(make("li", {}, make("strong", {textContent: value}), make("small", {textContent: text})));
  const done = s.epochs !== null && s.ended >= s.epochs;
  tile(s.epochs === null ? String(s.ended) : `${s.ended} of ${s.epochs}`, done ? "epochs: finished" : "epochs done so far");
  for (const [name, a] of Object.entries(s.top1)) tile(`${a.last} %`, `${name} top-1; best ${a.best} % after epoch ${a.epoch}`);
  if (data.labels) {
    const {counts, unseen} = data.labels, all = VERDICTS.reduce((sum, v) => sum + counts[v], 0);
    tile(percent(counts.relabelled + counts.removed, all), "estimated noise: labels changed or removed");
    for (const verdict of VERDICTS)
      tile(percent(counts[verdict], all), `${verdict}: ${plural(counts[verdict], "image")}`);
    if (unseen) tile(count(unseen), "images not judged");
  }
  for (const spec of data.charts.filter(one => one.group === "speed")) {
    const values = spec.lines[0].y.filter(v => v !== null).sort((a, b) => a - b);
    if (values.length) tile(number(values[values.length >> 1]) + spec.unit, `${spec.title.toLowerCase()}, median`);
  }
  $("about").textContent = [
    ({ce: "plain cross-entropy", mopro: "MoPro", capro: "CAPro"})[s.method], s.arch, s.data && `on ${s.data}`].filter(Boolean).join(", ");
}

function alarms() {
  $("alarms").hidden = !data.alarms.length;
  $("alarms").querySelector("ul").append(...data.alarms.map(([epoch, text]) => make("li", {textContent: `epoch ${epoch}: ${text}`})));
}

function missing() {
  const entries = Object.entries(data.missing);
  $("missing").hidden = !entries.length;
  $("missing").querySelector("ul").append(...entries.map(([what, why]) => make("li", {textContent: `${what}: ${why}`})));
}

function unreadableFiles() {
  const titles = {left_out: "Left out from the beginning", replaced: "Replaced while training"};
  let any = false;
  for (const [name, found] of Object.entries(data.files)) {
    if (!found || !found.count) continue;
    any = true;
    const table = make("table");
    head(table, found.columns.map(column => [column, true]));
    fill(table.createTBody(), found.rows);
    const kinds = found.kinds.map(([kind, n]) => `${count(n)} ${kind}`).join(", ");
    const more = found.count > found.rows.length ? ` The first ${found.rows.length} are here, all in ${name}.csv.` : "";
    const box = make("div", {className: "scroll", tabIndex: 0}, table);
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", titles[name]);
    $("files").append(make("h3", {textContent: `${titles[name]}: ${count(found.count)}`}),
      make("p", {className: "muted", textContent: `${kinds}.${more}`}),
      make("details", {}, make("summary", {textContent: "Which"}), box));
  }
  if (!any) $("files").append(make("p", {textContent: "None: no image was left out or replaced."}));
}

function settings() {
  const entries = Object.entries(data.config);
  if (!entries.length) return absent("settings", "there are none", "the settings");
  head($("settings-table"), [["setting", true], ["value", true], ["default, where it differs", true]]);
  fill($("settings-table").createTBody(), entries.map(([name, value]) => {
    const usual = data.defaults[name];
    return usual === undefined || usual === value ? [name, value, ""] : [make("strong", {textContent: name}), value, usual];
  }));
}

function labels() {
  showCharts("labels", "the curves", "the corrected labels");
  if (!data.labels) {
    for (const section of ["classes", "relabellings", "images"])
      absent(section, "the run has no labels yet", "the corrected labels", "the images", "the settings");
    return;
  }
  const {counts, unlabelled, source} = data.labels, begin = data.summary.start_clean;
  const note = begin !== null && data.summary.ended <= begin ? `No label is corrected before epoch ${begin + 1}. ` : "";
  $("labels-about").textContent = `${note}Numbers per class and images below: by ${source}.`
    + (unlabelled ? ` ${plural(unlabelled, "image")} came without a label.` : "");
  classTable();
  pairTable();
  if (data.images.length) {
    imagesAbout();
    gallery();
    return;
  }
  const unread = Object.entries(data.unread);
  absent("images", unread.length ? `none of ${plural(unread.length, "sampled image")} could be read, such as ${unread[0].join(": ")}`
    : "the sample is empty", "the images", "the settings");
}

tiles();
alarms();
missing();
showCharts("training", "the curves");
labels();
if (data.anchors) anchors();
else if ("the anchors" in data.missing) absent("anchors", "", "the anchors");
else for (const node of [$("anchors"), document.querySelector("a[href='#anchors']")]) node.hidden = true;
if (data.prototypes) prototypes(); else absent("prototypes", "there are none", "prototypes", "scores and prototypes");
showCharts("speed", "the speed");
unreadableFiles();
settings();
