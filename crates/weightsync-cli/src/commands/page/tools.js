// Names come from users: they are only ever put into the page as text.
const byId = (id) => document.getElementById(id);
const facts = JSON.parse(byId("facts").textContent);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

function element(kind, text, name) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}
function scaled(value, units, step, digits = 3) {
  let unit = 0;
  while (value >= step * 0.9995 && unit + 1 < units.length) { value /= step; unit += 1; }
  return (unit === 0 || value >= 99.95 && digits === 3 ? value.toFixed(0) : value.toPrecision(digits)) + " " + units[unit];
}
const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB", "PB"], 1000);
const time = (nanoseconds, digits) => nanoseconds === 0 ? "0 s" : scaled(nanoseconds, ["ns", "us", "ms", "s"], 1000, digits);
const count = (value) => value.toLocaleString("en");
const of = (value, one) => count(value) + " " + one + (value === 1 ? "" : "s");
const rankName = (rank) => "trainer" in rank ? "trainer " + rank.trainer : "inference " + rank.receiver;

// Figures and tables.
function figure(value, label) {
  const made = element("div", undefined, "figure");
  made.append(element("b", value), element("span", label));
  byId("figures").append(made);
}
function table(into, heads, rows) {
  const made = element("table"), head = element("tr");
  heads.forEach(([text, number]) => head.append(element("th", text, number ? "number" : "")));
  made.append(head);
  rows.forEach((cells) => {
    const row = element("tr");
    cells.forEach((text, at) => row.append(element("td", text, heads[at][1] ? "number" : "")));
    made.append(row);
  });
  into.append(rows.length ? made : element("div", "nothing moves", "soft"));
}
function legend(into, name, text) {
  const entry = element("span"), mark = element("i");
  mark.style.background = "var(--" + name + ")";
  entry.append(mark, text);
  into.append(entry);
}

// Canvases: drawn again whenever their width or the colours change.
const drawings = [];
function canvas(target, height, draw, hover) {
  const paint = () => {
    const ratio = window.devicePixelRatio || 1, width = target.clientWidth, tall = height(width);
    target.width = Math.round(width * ratio);
    target.height = Math.round(tall * ratio);
    target.style.height = tall + "px";
    const pen = target.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    draw(pen, width, tall);
  };
  drawings.push(paint);
  target.addEventListener("mousemove", (event) => {
    const place = target.getBoundingClientRect();
    const text = hover(event.clientX - place.left, event.clientY - place.top);
    const tip = byId("tip");
    tip.style.display = text ? "block" : "none";
    tip.textContent = text || "";
    const left = event.clientX + 14 + tip.offsetWidth > innerWidth ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14;
    tip.style.left = Math.max(0, left) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4) + "px";
  });
  target.addEventListener("mouseleave", () => { byId("tip").style.display = "none"; });
  paint();
}
function cut(pen, text, room) {
  if (pen.measureText(text).width <= room) return text;
  let keep = text.length;
  while (keep > 1 && pen.measureText(text.slice(0, keep) + "…").width > room) keep -= 1;
  return text.slice(0, keep) + "…";
}
function label(pen, text, x, y, align, base) {
  pen.fillStyle = colour("soft");
  pen.textAlign = align;
  pen.textBaseline = base;
  pen.fillText(text, x, y);
}
function line(pen, x0, y0, x1, y1, name) {
  pen.strokeStyle = colour(name);
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
}
// Four equal parts of a time that begins at 0, under a drawing.
function timeAxis(pen, left, wide, top, base, nanoseconds) {
  for (let part = 0; part <= 4; part += 1) {
    const x = Math.round(left + wide * part / 4) + 0.5;
    line(pen, x, top, x, base, "line");
    label(pen, time(nanoseconds * part / 4), x, base + 5, part === 0 ? "left" : part === 4 ? "right" : "center", "top");
  }
}
function axisTop(most) {
  const step = Math.pow(10, Math.floor(Math.log10(Math.max(1, most))));
  return [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((by) => by * step).find((top) => top >= most);
}

// One bar a value, a line across for the mean, the names of the first and the last under the axis.
const BARS = { left: 62, top: 6, right: 4, bottom: 18 };
function barChart(into, name, summary, values, mean, first, last, tip) {
  const head = element("div"), target = document.createElement("canvas");
  head.append(element("span", name), element("span", summary, "soft"));
  into.append(head, target);
  const top = axisTop(Math.max(0, ...values)), wideOf = (width) => Math.max(1, width - BARS.left - BARS.right);
  canvas(target, () => 104, (pen, width, tall) => {
    const wide = wideOf(width), high = tall - BARS.top - BARS.bottom, base = BARS.top + high;
    [0, 0.5, 1].forEach((share) => {
      const y = Math.round(base - share * high) + 0.5;
      line(pen, BARS.left, y, BARS.left + wide, y, "line");
      label(pen, bytes(share * top), BARS.left - 6, y, "right", "middle");
    });
    const each = wide / Math.max(1, values.length), gap = each > 4 ? 1 : 0, thick = Math.min(each - gap, 40);
    pen.fillStyle = colour("bar");
    if (each > 4) {
      values.forEach((value, at) => {
        const tall = value / top * high;
        pen.fillRect(BARS.left + at * each + (each - gap - thick) / 2, base - tall, thick, tall);
      });
    } else {
      // Bars narrower than a few pixels would blur: each pixel shows the largest value under it.
      const pixel = 1 / (window.devicePixelRatio || 1);
      for (let x = 0; x < wide; x += pixel) {
        const from = Math.floor(x / each), to = Math.max(from + 1, Math.ceil((x + pixel) / each));
        const tall = Math.max(0, ...values.slice(from, to)) / top * high;
        pen.fillRect(BARS.left + x, base - tall, pixel, tall);
      }
    }
    if (mean > 0) {
      const y = Math.round(base - mean / top * high) + 0.5;
      line(pen, BARS.left, y, BARS.left + wide, y, "mean");
    }
    if (values.length) {
      label(pen, first, BARS.left, base + 4, "left", "top");
      label(pen, last, BARS.left + wide, base + 4, "right", "top");
      label(pen, "line: the mean, " + bytes(mean), BARS.left + wide / 2, base + 4, "center", "top");
    }
  }, (x) => {
    const at = Math.floor((x - BARS.left) / wideOf(target.clientWidth) * values.length);
    return at >= 0 && at < values.length ? tip(at) : "";
  });
}

const again = () => drawings.forEach((paint) => paint());
addEventListener("resize", again);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
