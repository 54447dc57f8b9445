// A line chart in SVG: log axes, nearest point under the pointer or the arrow keys, zoom by dragging. No dependencies.
"use strict";

const SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const si = (v) => {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(v) >= size) return +(v / size).toPrecision(3) + unit;
  return String(+v.toPrecision(3));
};
const scientific = (v) => {
  if (!v) return "0";
  let power = Math.floor(Math.log10(Math.abs(v)) + 1e-9);
  if (Math.abs(power) < 4) return String(+v.toPrecision(4));
  const digits = [...String(Math.abs(power))].map((d) => SUPERSCRIPT[d]).join("");
  const head = +(v / 10 ** power).toPrecision(3);
  return (head === 1 ? "" : head + "·") + "10" + (power < 0 ? "⁻" : "") + digits;
};
const UNITS = [[172800, 86400, "d"], [7200, 3600, "h"], [120, 60, "min"], [-Infinity, 1, "s"]];
const unitOf = (s) => UNITS.find(([from]) => s >= from);
const time = (s) => +(s / unitOf(s)[1]).toPrecision(3) + " " + unitOf(s)[2];
const plainNumber = (v) => String(+v.toPrecision(4));
const escapeText = (s) => String(s).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function linearTicks(low, high, count) {
  const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
  const step = size * [1, 2, 5, 10].find((m) => m * size >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high * (1 + 1e-9) + 1e-300; k++) found.push(k * step);
  return found;
}

function logTicks(low, high, count) {
  const all = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high) + 1; e++)
    for (const m of [1, 2, 5]) all.push(m * 10 ** e);
  let inside = all.filter((v) => v >= low * 0.9999 && v <= high * 1.0001);
  if (inside.length < 3) return linearTicks(low, high, count);
  if (inside.length > count + 2) inside = inside.filter((v) => Math.abs(Math.log10(v) % 1) < 1e-9);
  const every = Math.ceil(inside.length / (count + 2));
  return inside.filter((_, i) => i % every === 0);
}

class Scale {
  constructor([low, high], log, from, to) {
    this.f = log ? Math.log : (v) => v;
    this.inverse = log ? Math.exp : (v) => v;
    Object.assign(this, { low, high, log, from });
    this.a = (to - from) / (this.f(high) - this.f(low) || 1);
  }
  at(v) { return this.from + (this.f(v) - this.f(this.low)) * this.a; }
  of(pixel) { return this.inverse((pixel - this.from) / this.a + this.f(this.low)); }
  // unit: what ticks are round numbers of, such as the 60 seconds of a minute.
  ticks(count, unit = 1) { return (this.log ? logTicks : linearTicks)(this.low / unit, this.high / unit, count).map((v) => v * unit); }
}

class Chart {
  // box: an element; tell(series, k): HTML of the tooltip; lit(id): told what is pointed at, or null.
  constructor(box, label, tell, lit) {
    Object.assign(this, { box, tell, lit, zoom: null, series: [], point: null });
    box.innerHTML = `<svg tabindex="0" role="img" aria-label="${escapeText(label)}"></svg>
      <div class="tip" role="status" hidden></div><button class="unzoom" hidden>whole picture</button>`;
    [this.svg, this.tip, this.button] = box.children;
    this.button.onclick = () => this.setZoom(null);
    this.svg.addEventListener("pointermove", (e) => this.move(e));
    this.svg.addEventListener("pointerdown", (e) => this.press(e));
    this.svg.addEventListener("pointerup", (e) => this.release(e));
    this.svg.addEventListener("pointerleave", (e) => e.pointerType === "mouse" && this.show(null));
    this.svg.addEventListener("dblclick", () => this.setZoom(null));
    this.svg.addEventListener("blur", () => this.show(null));
    this.svg.addEventListener("keydown", (e) => this.key(e));
    new ResizeObserver(() => this.box.clientWidth !== this.width && this.draw()).observe(box);
  }

  // series: {id, colour, x, y, width, opacity, dots, dash, quiet, text}; axes: {x, y}: {name, log, format, range}
  set(series, axes) {
    Object.assign(this, { series, axes });
    this.draw();
  }

  setZoom(zoom) {
    this.zoom = zoom;
    this.draw();
  }

  range(axis) {
    if (this.zoom) return this.zoom[axis];
    let low = Infinity, high = -Infinity;
    for (const s of this.series)
      for (const v of s[axis]) {
        if (v === null || !isFinite(v) || (this.axes[axis].log && v <= 0)) continue;
        if (v < low) low = v;
        if (v > high) high = v;
      }
    const limit = this.axes[axis].limit;
    if (limit && limit > low) high = Math.min(high, limit);
    if (low > high) [low, high] = this.axes[axis].log ? [1, 10] : [0, 1];
    if (axis === "x") return low === high ? [low * 0.5, high * 1.5 || 1] : [this.axes.x.log ? low : Math.min(low, 0), high];
    const pad = this.axes.y.log ? Math.pow(high / low, 0.04) || 1.05 : (high - low || 1) * 0.04;
    return this.axes.y.log ? [low / Math.max(pad, 1.001), high * Math.max(pad, 1.001)] : [low - pad, high + pad];
  }

  draw() {
    if (!this.axes || !this.box.clientWidth) return;
    const w = (this.width = this.box.clientWidth), small = w < 560;
    const h = Math.round(Math.max(280, Math.min(560, w * (small ? 0.85 : 0.52))));
    const edge = { left: 52, right: this.axes.x.room || 14, top: 30, bottom: 44 };
    this.sx = new Scale(this.range("x"), this.axes.x.log, edge.left, w - edge.right);
    this.sy = new Scale(this.range("y"), this.axes.y.log, h - edge.bottom, edge.top);
    const out = [`<defs><clipPath id="clip-${this.box.id}"><rect x="${edge.left}" y="${edge.top - 6}"
      width="${w - edge.left - edge.right + 6}" height="${h - edge.bottom - edge.top + 6}"/></clipPath></defs><g class="axis">`];
    for (const v of this.sy.ticks(6)) {
      const y = this.sy.at(v).toFixed(1);
      out.push(`<path d="M${edge.left} ${y}H${w - edge.right}"/><text x="${edge.left - 7}" y="${y}" dy=".32em" text-anchor="end">${this.axes.y.format(v)}</text>`);
    }
    const unit = this.axes.x.unit ? this.axes.x.unit(this.sx.high) : 1;
    for (const v of this.sx.ticks(small ? 3 : 8, unit)) {
      const x = this.sx.at(v).toFixed(1);
      out.push(`<path d="M${x} ${h - edge.bottom}v5"/><text x="${x}" y="${h - edge.bottom + 19}" text-anchor="middle">${this.axes.x.format(v)}</text>`);
    }
    out.push(`<text class="name" x="${w - edge.right}" y="${h - 5}" text-anchor="end">${escapeText(this.axes.x.name)}</text>`);
    out.push(`<text class="name" x="${edge.left - 7}" y="13" text-anchor="start" dx="-38">${escapeText(this.axes.y.name)}</text>`);
    out.push(`</g><g class="plot" clip-path="url(#clip-${this.box.id})">`);
    for (const s of this.series) out.push(this.shape(s));
    out.push(`</g><g class="names">`);
    for (const s of this.series) if (s.text) out.push(this.name(s));
    out.push(`</g><circle class="at" r="5" hidden></circle><rect class="band" hidden></rect>`);
    this.svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
    this.svg.style.height = h + "px";
    this.svg.innerHTML = out.join("");
    this.button.hidden = !this.zoom;
    this.show(null);
  }

  // Where a series is in pixels, and its path.
  shape(s) {
    const d = [], dots = [];
    s.px = s.x.map((v) => (this.sx.log && !(v > 0) ? NaN : this.sx.at(v)));
    s.py = s.y.map((v) => (v === null || (this.sy.log && v <= 0) ? NaN : this.sy.at(v)));
    let open = false;
    for (let k = 0; k < s.px.length; k++) {
      if (isNaN(s.px[k]) || isNaN(s.py[k])) { open = false; continue; }
      const at = s.px[k].toFixed(1) + " " + Math.max(-1e4, Math.min(1e4, s.py[k])).toFixed(1);
      d.push((open ? "L" : "M") + at);
      if (s.dots) dots.push(`M${at}h0`);
      open = true;
    }
    const look = `data-id="${s.id}" stroke="${s.colour}" opacity="${s.opacity ?? 1}"`;
    const dotted = dots.length ? `<path class="dots" ${look} stroke-width="${s.dots}" d="${dots.join("")}"/>` : "";
    if (!s.width) return dotted;
    return `<path ${look} ${s.pale ? 'class="pale"' : ""} stroke-width="${s.width}" stroke-dasharray="${s.dash || "none"}" d="${d.join("")}"/>${dotted}`;
  }

  name(s) {
    const k = s.px.length - 1;
    return `<text x="${(s.px[k] + 6).toFixed(1)}" y="${(s.py[k] - 8).toFixed(1)}" fill="${s.colour}">${escapeText(s.text)}</text>`;
  }

  where(event) {
    const at = this.svg.getBoundingClientRect();
    return [event.clientX - at.left, event.clientY - at.top];
  }

  move(event) {
    const [x, y] = this.where(event);
    if (this.from && Math.hypot(x - this.from[0], y - this.from[1]) > 6) return this.stretch(x, y);
    let best = 2500, found = null; // within 50 pixels
    for (const s of this.series) {
      if (s.quiet) continue;
      for (let k = 0; k < s.px.length; k++) {
        const d = (s.px[k] - x) ** 2 + (s.py[k] - y) ** 2;
        if (d < best) [best, found] = [d, [s, k]];
      }
    }
    this.show(found);
  }

  press(event) {
    if (event.pointerType === "mouse" && event.button === 0) this.from = this.where(event);
    else this.move(event);
  }

  stretch(x, y) {
    this.show(null);
    const [x0, y0] = this.from, band = this.svg.querySelector(".band");
    band.removeAttribute("hidden");
    for (const [key, value] of Object.entries({ x: Math.min(x, x0), y: Math.min(y, y0), width: Math.abs(x - x0), height: Math.abs(y - y0) }))
      band.setAttribute(key, value);
    this.to = [x, y];
  }

  release() {
    const { from, to } = this;
    this.from = this.to = null;
    if (!from || !to || Math.abs(from[0] - to[0]) < 6 || Math.abs(from[1] - to[1]) < 6) return;
    const sorted = (scale, a, b) => [scale.of(a), scale.of(b)].sort((p, q) => p - q);
    this.setZoom({ x: sorted(this.sx, from[0], to[0]), y: sorted(this.sy, from[1], to[1]) });
  }

  key(event) {
    const loud = this.series.filter((s) => !s.quiet && s.px.length);
    if (!loud.length || !/^(Arrow|Escape)/.test(event.key)) return;
    event.preventDefault();
    if (event.key === "Escape") return this.zoom ? this.setZoom(null) : this.show(null);
    let [s, k] = this.point || [loud[0], loud[0].px.length];
    if (event.key === "ArrowLeft") k--;
    if (event.key === "ArrowRight") k++;
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      const next = loud[(loud.indexOf(s) + (event.key === "ArrowDown" ? 1 : -1) + loud.length) % loud.length];
      k = Math.round((k / s.px.length) * next.px.length);
      s = next;
    }
    this.show([s, Math.max(0, Math.min(s.px.length - 1, k))]);
  }

  // Point at [series, k], or at nothing.
  show(point) {
    this.point = point;
    const at = this.svg.querySelector(".at");
    this.light(point ? point[0].id : null);
    this.lit(point ? point[0].id : null);
    this.tip.hidden = !point;
    if (!at) return;
    at.toggleAttribute("hidden", !point);
    if (!point) return;
    const [s, k] = point;
    at.setAttribute("cx", s.px[k]);
    at.setAttribute("cy", s.py[k]);
    at.setAttribute("stroke", s.colour);
    this.tip.innerHTML = this.tell(s, k);
    const room = this.width - this.tip.offsetWidth - 4, right = s.px[k] + 14;
    this.tip.style.left = Math.max(4, right > room ? Math.min(room, s.px[k] - this.tip.offsetWidth - 14) : right) + "px";
    this.tip.style.top = Math.max(4, Math.min(s.py[k] - 20, this.svg.clientHeight - this.tip.offsetHeight - 48)) + "px";
  }

  light(id) {
    const plot = this.svg.querySelector(".plot");
    if (!plot) return;
    plot.classList.toggle("hot", id !== null);
    for (const path of plot.querySelectorAll(".on")) path.classList.remove("on");
    if (id !== null) for (const path of plot.querySelectorAll(`[data-id="${id}"]`)) path.classList.add("on");
  }
}
