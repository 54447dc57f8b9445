// What moves on the page: which runs are shown, their colours, the two charts. The tables are there without it.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, of = document) => of.querySelector(selector);
const all = (selector, of = document) => [...of.querySelectorAll(selector)];
const rows = all("#runs tbody tr");
const X = {
  tokens: { name: "tokens", format: si }, step: { name: "steps", format: si },
  flops: { name: "compute (FLOPs)", format: scientific }, seconds: { name: "time in training steps", format: time, unit: (s) => unitOf(s)[1] },
};

// ---- choices ----
const shown = data.runs.map((run) => run.curves);
const choice = {
  x: "tokens", loss: data.loss, logx: false, logy: false, smooth: 0,
  by: Math.max(0, data.keys.findIndex((key) => key.name !== "seed" && key.values.length > 1)),
};

// ---- colours ----
const SEQUENCE = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"]; // viridis
const dark = () => {
  const set = document.documentElement.dataset.theme;
  return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
function sequential(t) {
  t = (dark() ? 0.3 + 0.7 * t : 0.05 + 0.7 * t) * (SEQUENCE.length - 1);
  const i = Math.min(SEQUENCE.length - 2, Math.floor(t));
  const [a, b] = [SEQUENCE[i], SEQUENCE[i + 1]].map((c) => [1, 3, 5].map((k) => parseInt(c.slice(k, k + 2), 16)));
  return `rgb(${a.map((v, k) => Math.round(v + (b[k] - v) * (t - i))).join(",")})`;
}
function colour(key, value) {
  if (!key) return getComputedStyle(document.documentElement).getPropertyValue("--c0");
  if (key.ordered && key.values.length > 2) return sequential(value / (key.values.length - 1));
  return getComputedStyle(document.documentElement).getPropertyValue(`--c${value % 8}`);
}
const colourOf = (i) => colour(data.keys[choice.by], data.runs[i].v[choice.by]);
const dashOf = (i) => {
  const key = data.keys[choice.by];
  return key && !(key.ordered && key.values.length > 2) && data.runs[i].v[choice.by] >= 8 ? "6 3" : "";
};

// ---- series ----
function xs(run, curve, axis) {
  if (axis === "seconds") return curve.seconds;
  if (axis === "step") return curve.step;
  const tokens = curve.tokens || curve.step.map((s) => s * run.tokens_per_step);
  return axis === "tokens" ? tokens : tokens.map((t) => t * run.flops_per_token);
}
function smooth(step, y, weight) {
  if (!weight) return y;
  const mean = (step[step.length - 1] - step[0]) / Math.max(1, step.length - 1) || 1;
  let sum = 0, mass = 0;
  return y.map((v, k) => {
    if (v === null) return null;
    const keep = Math.pow(weight, k ? (step[k] - step[k - 1]) / mean : 1);
    sum = keep * sum + (1 - keep) * v;
    mass = keep * mass + (1 - keep);
    return sum / mass;
  });
}
function seriesOf(i, kind, axis, style) {
  const run = data.runs[i], curve = run[kind];
  if (!curve || !curve.step.length) return [];
  const x = xs(run, curve, axis), one = { id: i, kind, x, raw: curve.loss, step: curve.step, colour: colourOf(i), dash: dashOf(i), ...style };
  if (kind === "train" && choice.smooth && !style.exact) {
    const y = smooth(curve.step, curve.loss, choice.smooth);
    return [{ ...one, y: curve.loss, opacity: 0.22, width: 1, quiet: true, pale: true }, { ...one, y }];
  }
  return [{ ...one, y: curve.loss }];
}
const many = () => shown.filter(Boolean).length > 40;
function styleOf(kind) {
  const width = many() ? 1.1 : 1.8;
  if (kind === "val") return { width, dots: data.runs.some((r) => r.val && r.val.step.length > 60) || many() ? 0 : width * 3 };
  return choice.loss === "both" ? { width: 1, opacity: 0.5, dots: 0 } : { width: Math.max(1, width - 0.4) };
}

// ---- the charts ----
const nameOf = (i) => data.keys.map((key, k) => (key.name === "state" || key.values[data.runs[i].v[k]] === "" ? "" : `${key.name}=${key.values[data.runs[i].v[k]]}`)).filter(Boolean).join("  ") || data.runs[i].name;
function tell(s, k) {
  const run = data.runs[s.id];
  const facts = [[s.kind === "val" ? "val/loss" : "train/loss", s.raw[k] === null ? "" : s.raw[k].toFixed(4)]];
  if (s.y[k] !== s.raw[k]) facts.push(["smoothed", s.y[k].toFixed(4)]);
  const curve = run[s.kind];
  for (const axis of ["step", "tokens", "flops", "seconds"]) {
    const x = (axis !== "flops" || run.flops_per_token) && xs(run, curve, axis);
    if (x) facts.push([{ flops: "compute", seconds: "time" }[axis] || axis, axis === "step" ? x[k].toLocaleString("en") : X[axis].format(x[k])]);
  }
  if (run.each > 1 && s.kind === "train") facts.push(["mean of", `about ${run.each} steps`]);
  return `<b>${escapeText(nameOf(s.id))}</b><dl>${facts.map(([a, b]) => `<dt>${a}</dt><dd>${b}</dd>`).join("")}</dl>`;
}
const mark = (id) => rows.forEach((row) => row.classList.toggle("on", id !== null && +row.dataset.run === id));
const curves = $("#curves") && new Chart($("#curves"), "Loss curves of the selected runs; arrow keys move from point to point, the table below has the last figures", tell, mark);
const compute = $("#compute") && new Chart($("#compute"), "Loss against compute, both logarithmic, for each model size; the table beside it has the figures", tell, mark);

// A run that diverged must not press all others flat: nothing is drawn far above where training starts.
function ceiling() {
  const first = data.runs.map((r) => (r.train || r.val || { loss: [] }).loss.find((v) => v !== null)).filter((v) => v > 0);
  return first.sort((a, b) => a - b)[first.length >> 1] || 0;
}
function drawCurves() {
  if (!curves) return;
  const kinds = choice.loss === "both" ? ["train", "val"] : [choice.loss], series = [];
  for (const kind of kinds)
    for (let i = shown.length - 1; i >= 0; i--) if (shown[i]) series.push(...seriesOf(i, kind, choice.x, styleOf(kind)));
  const limit = ceiling() * 1.15;
  curves.set(series, { x: { ...X[choice.x], log: choice.logx }, y: { name: "loss (nats per token)", format: plainNumber, log: choice.logy, limit } });
  const count = shown.filter(Boolean).length;
  $("#count").textContent = `${count} of ${data.runs.filter((r) => r.curves).length} curves`;
}

function drawCompute() {
  if (!compute) return;
  const { sizes, frontier, ends, fit, fitted } = data.sizes, series = [];
  const tint = (p) => sequential(sizes.length > 1 ? sizes.indexOf(p) / (sizes.length - 1) : 0);
  const kind = data.metric === "val/loss" ? "val" : "train";
  data.runs.forEach((run, i) => {
    if (!run.curves || !run[kind] || !run.flops_per_token) return;
    series.push(...seriesOf(i, kind, "flops", { width: 1.2, opacity: 0.65, colour: tint(run.parameters), dash: "", exact: true }));
  });
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink");
  const line = (points, style) => ({ id: -1, quiet: true, colour: ink, x: points.map((p) => p[0]), y: points.map((p) => p[1]), ...style });
  series.push(line(frontier, { width: 2.2 }));
  if (fit) {
    const [a, b] = fit, low = fitted[0][0], high = fitted[fitted.length - 1][0];
    const along = Array.from({ length: 30 }, (_, k) => low * (high / low) ** (k / 29));
    series.push(line(along.map((c) => [c, a * c ** -b]), { width: 1.5, dash: "3 4" }));
  }
  for (const [flops, loss, size] of ends)
    series.push({ ...line([[flops, loss]], { dots: 9, colour: tint(size), text: si(size) }) });
  compute.set(series, { x: { ...X.flops, log: true, room: 52 }, y: { name: `${data.metric} (nats per token)`, format: plainNumber, log: true, limit: ceiling() } });
}

// ---- which runs are shown ----
function refresh() {
  rows.forEach((row) => {
    const i = +row.dataset.run, box = $("input", row);
    row.classList.toggle("off", !shown[i]);
    if (box) box.checked = shown[i];
    const swatch = $(".swatch", row);
    if (swatch) swatch.style.background = data.runs[i].curves ? colourOf(i) : "transparent";
  });
  all("#filters button[data-value]").forEach((chip) => {
    const [k, value] = [+chip.dataset.key, +chip.dataset.value];
    const mine = data.runs.map((r, i) => i).filter((i) => data.runs[i].v[k] === value && data.runs[i].curves);
    const on = mine.filter((i) => shown[i]).length;
    chip.setAttribute("aria-pressed", on === 0 ? "false" : on === mine.length ? "true" : "mixed");
    chip.style.setProperty("--swatch", k === choice.by ? colour(data.keys[k], value) : "transparent");
    chip.disabled = !mine.length;
  });
  drawCurves();
}
function toggle(list, on) {
  for (const i of list) shown[i] = on && data.runs[i].curves;
  refresh();
}

function buildFilters() {
  const box = $("#filters");
  data.keys.forEach((key, k) => {
    if (key.values.length < 2) return;
    const group = document.createElement("div");
    group.className = "key";
    group.innerHTML = `<div class="title"><label><input type="radio" name="by" value="${k}" ${k === choice.by ? "checked" : ""}> ${escapeText(key.name)}</label></div>
      <div class="chips">${key.values.map((v, n) => `<button type="button" data-key="${k}" data-value="${n}"><i></i>${escapeText(v === "" ? "(none)" : v)}</button>`).join("")}</div>`;
    box.append(group);
  });
  box.addEventListener("change", (e) => { choice.by = +e.target.value; refresh(); });
  box.addEventListener("click", (e) => {
    const chip = e.target.closest("button[data-value]");
    if (!chip) return;
    const mine = data.runs.map((r, i) => i).filter((i) => data.runs[i].v[+chip.dataset.key] === +chip.dataset.value);
    if (e.shiftKey) shown.fill(false);
    toggle(mine, e.shiftKey || chip.getAttribute("aria-pressed") === "false");
  });
  $("#all").onclick = () => toggle(shown.keys(), true);
  $("#none").onclick = () => toggle(shown.keys(), false);
  $("#five").onclick = () => { shown.fill(false); toggle(data.runs.map((r, i) => i).filter((i) => data.runs[i].curves).slice(0, 5), true); };
}

function buildControls() {
  if (!data.runs.some((r) => r.curves && r.flops_per_token)) $("[name=x][value=flops]").closest("label").remove();
  if (!data.runs.some((r) => r.train && r.train.seconds)) $("[name=x][value=seconds]").closest("label").remove();
  if (!data.runs.some((r) => r.val)) $("#loss").remove();
  if (!data.runs.some((r) => r.train)) $("#smooth").remove();
  all("[name=loss]").forEach((input) => (input.checked = input.value === choice.loss));
  $("#controls").addEventListener("input", (e) => {
    const { name, type, value, checked } = e.target;
    if (name in choice) choice[name] = type === "checkbox" ? checked : name === "smooth" ? +value : value;
    $("#smoothing").textContent = choice.smooth ? choice.smooth.toFixed(2) : "off";
    curves.zoom = null;
    refresh();
  });
}

// ---- the table ----
function buildTable() {
  const head = $("#runs thead tr");
  if (!head) return;
  head.insertAdjacentHTML("afterbegin", `<th scope="col"><span class="unseen">shown</span></th>`);
  rows.forEach((row) => {
    const i = +row.dataset.run, can = data.runs[i].curves;
    row.insertAdjacentHTML("afterbegin", `<td class="pick"><label><input type="checkbox" ${can ? "" : "disabled"} aria-label="show ${escapeText(nameOf(i))}"><i class="swatch"></i></label></td>`);
    row.addEventListener("click", (e) => {
      if (e.target.closest("a, label, button") || String(getSelection())) return;
      toggle([i], !shown[i]);
    });
    $("input", row).addEventListener("change", (e) => toggle([i], e.target.checked));
    row.addEventListener("mouseenter", () => curves && curves.light(shown[i] ? i : null));
    row.addEventListener("mouseleave", () => curves && curves.light(null));
  });
  all("table.sortable").forEach((table) => all("thead th", table).forEach((th, column) => {
    if (th.querySelector(".unseen")) return;
    th.innerHTML = `<button type="button">${th.innerHTML}</button>`;
    $("button", th).onclick = () => sortBy(table, th, column);
  }));
}
function sortBy(table, th, column) {
  const down = th.getAttribute("aria-sort") === "ascending";
  all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => { const v = row.cells[column].dataset.v ?? row.cells[column].textContent; return v === "" ? null : isNaN(v) ? v : +v; };
  const order = (a, b) => {
    const [p, q] = [value(a), value(b)];
    if (p === null || q === null) return (p === null) - (q === null);
    return (typeof p === "number" && typeof q === "number" ? p - q : String(p).localeCompare(String(q))) * (down ? -1 : 1);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
}

// ---- copy, theme ----
all("button.copy").forEach((button) => {
  button.hidden = false;
  button.onclick = async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1500);
  };
});
// The reason stands at the end of a log.
all("details").forEach((box) => {
  const end = () => all("pre", box).forEach((pre) => (pre.scrollTop = pre.scrollHeight));
  box.addEventListener("toggle", end);
  end();
});
$("#theme").hidden = false;
$("#theme").onclick = () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  refresh();
  drawCompute();
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { refresh(); drawCompute(); });

buildTable();
if (curves) { buildFilters(); buildControls(); }
refresh();
drawCompute();
