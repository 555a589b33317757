// Line charts and stacked areas as inline SVG, redrawn to the available width.
// A chart: {title, unit, note, stacked, lines: [{label, colour, x: [step], y: [value or null]}], marks: [{label, y, colour}]}.

const HEIGHT = 220;
const MARGIN = { top: 10, right: 24, bottom: 34, left: 52 };
const COLOURS = 8;
const DOTS = 25; // a line with at most this many points shows each of them
const SMOOTHED = 60; // a line with more points is drawn with its running mean
const CROWD = 2; // with more such lines in a chart, the raw values are drawn fainter

function chartFigure(chart) {
  const factor = chart.unit === "%" ? 100 : 1;
  const lines = chart.lines.map((line) => ({ ...line, y: line.y.map((y) => (y === null ? null : y * factor)) }));
  const marks = chart.marks.map((mark) => ({ ...mark, y: mark.y * factor }));
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const plot = element("div", { class: "plot" });
  const tooltip = element("div", { class: "tooltip", role: "status", hidden: true });
  const state = { ...chart, lines, marks, steps, plot, tooltip, at: null };
  const redraw = () => {
    const width = plot.clientWidth;
    if (width > 0) plot.replaceChildren(drawChart(state, width), tooltip);
  };
  new ResizeObserver(redraw).observe(plot);
  const unit = [chart.unit, chart.note].filter(Boolean).join(", ");
  const caption = element("figcaption", {}, chart.title, element("span", { class: "unit" }, ` ${unit}`));
  return element("figure", { class: "chart" }, caption, legend(state), plot);
}

function legend(chart) {
  if (chart.lines.length + chart.marks.length < 2) return null;
  const entry = (line, kind) =>
    element("li", {}, element("span", { class: `swatch ${kind} ${paint(line.colour)}` }), line.label);
  const marks = chart.marks.map((mark) =>
    entry({ ...mark, label: mark.label.includes("%") ? mark.label : `${mark.label} ${withUnit(mark.y, chart.unit)}` }, "dashed"),
  );
  return element("ul", { class: "legend" }, chart.lines.map((line) => entry(line, dash(line.colour))), marks);
}

function paint(colour) {
  return colour === null ? "cm" : `c${colour % COLOURS}`;
}

function dash(colour) {
  return colour >= COLOURS ? "dashed" : "";
}

function drawChart(chart, width) {
  const bands = chart.stacked ? stack(chart.lines) : null;
  const [x, y] = scales(chart, bands, width);
  const svg = shape("svg", {
    width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", tabindex: 0, "aria-label": describe(chart),
  });
  svg.append(axes(chart, x, y, width));
  for (const mark of chart.marks) {
    svg.append(shape("line", {
      class: `mark ${paint(mark.colour)}`, x1: x.from, x2: x.to, y1: y(mark.y), y2: y(mark.y),
    }));
  }
  chart.lines.forEach((line, i) => svg.append(...(bands ? [area(line, bands[i], x, y)] : curve(line, x, y, chart.lines.length > CROWD))));
  const pointer = shape("g", { class: "pointer" });
  svg.append(pointer);
  listen(svg, chart, x, y, pointer, bands);
  return svg;
}

// Scales map a value to pixels; `ticks` are the values that get a label.
function scales(chart, bands, width) {
  const values = bands
    ? bands.flatMap((band) => band.map(([, top]) => top))
    : chart.lines.flatMap((line) => line.y.filter((y) => y !== null));
  const all = [...values, ...chart.marks.map((mark) => mark.y)];
  let low = Math.min(0, least(all));
  let high = most(all);
  if (chart.unit === "%" && high > 60) high = 100;
  if (high === low) high = low + 1;
  const yTicks = niceTicks(low, high, 5);
  low = Math.min(low, yTicks[0]);
  high = Math.max(high, yTicks[yTicks.length - 1]);
  const first = chart.steps[0];
  const last = Math.max(chart.steps[chart.steps.length - 1], first + 1);
  const from = MARGIN.left;
  const to = width - MARGIN.right;
  const bottom = HEIGHT - MARGIN.bottom;
  const x = (step) => from + ((step - first) / (last - first)) * (to - from);
  const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - MARGIN.top);
  const xTicks = niceTicks(first, last, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger);
  return [Object.assign(x, { from, to, ticks: xTicks }), Object.assign(y, { bottom, ticks: yTicks })];
}

// Not Math.min(...values): a long argument list overflows the stack.
function least(values) {
  return values.reduce((a, b) => Math.min(a, b), Infinity);
}

function most(values) {
  return values.reduce((a, b) => Math.max(a, b), -Infinity);
}

// About `count` multiples of 1, 2 or 5 times a power of ten, from inside [low, high] to the first one past `high`.
function niceTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const start = Math.floor(low / step + 1e-9);
  const stop = Math.ceil(high / step - 1e-9);
  const ticks = [];
  for (let i = start; i <= stop; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function axes(chart, x, y, width) {
  const group = shape("g", { class: "axes" });
  for (const value of y.ticks) {
    group.append(
      shape("line", { class: "grid", x1: x.from, x2: x.to, y1: y(value), y2: y(value) }),
      shape("text", { x: x.from - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)),
    );
  }
  for (const step of x.ticks) {
    if (x(step) < x.from - 1 || x(step) > x.to + 1) continue;
    group.append(shape("text", { x: x(step), y: y.bottom + 18, "text-anchor": "middle" }, whole(step)));
  }
  group.append(shape("text", { class: "name", x: x.to, y: HEIGHT - 3, "text-anchor": "end" }, "step"));
  return group;
}

function curve(line, x, y, crowded) {
  const points = line.x.map((step, i) => [step, line.y[i]]);
  const look = `curve ${paint(line.colour)} ${dash(line.colour)}`;
  if (points.length > SMOOTHED) {
    const size = Math.round(points.length / 30);
    return [
      shape("path", { class: `${look} ${crowded ? "faint" : "raw"}`, d: path(points, x, y) }),
      shape("path", { class: look, d: path(runningMean(points, size), x, y) }),
    ];
  }
  const shapes = [shape("path", { class: look, d: path(points, x, y) })];
  if (points.length <= DOTS) {
    for (const [step, value] of points) {
      if (value !== null) shapes.push(shape("circle", { class: `dot ${paint(line.colour)}`, cx: x(step), cy: y(value), r: 2.5 }));
    }
  }
  return shapes;
}

function path(points, x, y) {
  let text = "";
  let pen = "M";
  for (const [step, value] of points) {
    if (value === null) {
      pen = "M";
    } else {
      text += `${pen}${x(step).toFixed(1)},${y(value).toFixed(1)}`;
      pen = "L";
    }
  }
  return text;
}

// Mean over `size` points on either side; fewer near the ends of a line, down to a quarter, so that a steep start is not
// shifted. Running sums keep long lines cheap.
function runningMean(points, size) {
  const sums = [0];
  const counts = [0];
  points.forEach(([, value], i) => {
    sums.push(sums[i] + (value ?? 0));
    counts.push(counts[i] + (value === null ? 0 : 1));
  });
  return points.map(([step], i) => {
    const reach = Math.max(Math.min(size, i, points.length - 1 - i), size >> 2);
    const from = Math.max(0, i - reach);
    const to = Math.min(points.length, i + reach + 1);
    const count = counts[to] - counts[from];
    return [step, count ? (sums[to] - sums[from]) / count : null];
  });
}

// [bottom, top] of every line at every step, stacked. The lines of a stack have the same steps.
function stack(lines) {
  const heights = lines[0].x.map(() => 0);
  return lines.map((line) => line.y.map((value, i) => [heights[i], (heights[i] += value ?? 0)]));
}

function area(line, band, x, y) {
  const top = line.x.map((step, i) => `${x(step).toFixed(1)},${y(band[i][1]).toFixed(1)}`);
  const bottom = line.x.map((step, i) => `${x(step).toFixed(1)},${y(band[i][0]).toFixed(1)}`).reverse();
  return shape("polygon", { class: `area ${paint(line.colour)}`, points: [...top, ...bottom].join(" ") });
}

function describe(chart) {
  const ends = chart.lines.map((line) => {
    const known = line.y.flatMap((value, i) => (value === null ? [] : [i]));
    const say = (i) => `${withUnit(line.y[i], chart.unit)} at step ${whole(line.x[i])}`;
    return `${line.label}: from ${say(known[0])} to ${say(known[known.length - 1])}`;
  });
  return `${chart.title}. ${ends.join("; ")}. Left and right arrow keys read the values.`;
}

// A guide line and the values under the pointer, or at the step chosen by the arrow keys.
function listen(svg, chart, x, y, pointer, bands) {
  const { steps, tooltip, plot } = chart;
  const hide = () => {
    pointer.replaceChildren();
    tooltip.hidden = true;
    chart.at = null;
  };
  const show = (index) => {
    chart.at = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[chart.at];
    const rows = [];
    pointer.replaceChildren(shape("line", { x1: x(step), x2: x(step), y1: MARGIN.top, y2: y.bottom }));
    chart.lines.forEach((line, i) => {
      const place = line.x.indexOf(step);
      const value = place < 0 ? null : line.y[place];
      if (value === null) return;
      const height = bands ? bands[i][place][1] : value;
      pointer.append(shape("circle", { class: paint(line.colour), cx: x(step), cy: y(height), r: 3.5 }));
      rows.push(element("div", {}, element("span", { class: `swatch ${paint(line.colour)}` }), `${line.label} `,
        element("b", {}, chart.unit === "%" ? withUnit(value, "%") : short(value))));
    });
    if (chart.stacked) rows.reverse();
    const unit = chart.unit && chart.unit !== "%" ? ` (${chart.unit})` : "";
    tooltip.replaceChildren(element("div", { class: "at" }, `step ${whole(step)}${unit}`), ...rows);
    tooltip.hidden = false;
    const beside = x(step) + 12 + tooltip.offsetWidth > plot.clientWidth ? x(step) - 12 - tooltip.offsetWidth : x(step) + 12;
    tooltip.style.left = `${Math.max(0, beside)}px`;
  };
  svg.addEventListener("pointermove", (event) => {
    const place = event.clientX - svg.getBoundingClientRect().left;
    show(nearest(steps, place, x));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const last = steps.length - 1;
    const to = { ArrowRight: (chart.at ?? -1) + 1, ArrowLeft: (chart.at ?? last + 1) - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}

// Index of the nearest step, by bisection.
function nearest(steps, place, x) {
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x(steps[middle]) + x(steps[middle + 1]) < 2 * place) low = middle + 1;
    else high = middle;
  }
  return low;
}
