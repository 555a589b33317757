// The browser of completions: search, filters, a step slider and sorting over the rows that the page holds.

const PAGE = 20; // completions that are drawn at a time
const ORDERS = {
  "step, first to last": (a, b) => a.step - b.step,
  "step, last to first": (a, b) => b.step - a.step,
  "reward, best first": (a, b) => b.reward - a.reward,
  "reward, worst first": (a, b) => a.reward - b.reward,
  "length, longest first": (a, b) => b.length - a.length,
  "length, shortest first": (a, b) => a.length - b.length,
};

function completionBrowser(rows, runs, pattern) {
  const steps = [...new Set(rows.map((row) => row.step))].sort((a, b) => a - b);
  const haystacks = rows.map((row) => `${row.question}\n${row.answer}\n${row.completion}`.toLowerCase());
  const search = element("input", { type: "search", placeholder: "question, answer or completion", id: "search" });
  const run = choice("run", [["", "all runs"], ...runs.map((name, i) => [i, name])]);
  const kind = choice("kind", [["", "all kinds"], ...[...new Set(rows.map((row) => row.kind))].sort().map((name) => [name, name || "(none)"])]);
  const sort = choice("sort", Object.keys(ORDERS).map((name) => [name, name]));
  const slider = element("input", { type: "range", min: 0, max: steps.length, step: 1, value: 0, id: "step" });
  const reading = element("output", { for: "step" });
  const reflecting = element("input", { type: "checkbox", id: "reflecting" });
  const count = element("p", { class: "count", role: "status" });
  const list = element("div", { class: "completions" });
  const more = element("button", { type: "button", id: "more" });
  let found = [];
  let drawn = 0;

  function draw(upTo) {
    const words = search.value.trim();
    while (drawn < Math.min(upTo, found.length)) {
      const row = found[drawn++];
      list.append(card(row, runs.length > 1 ? runs[row.run] : null, pattern, words));
    }
    const left = found.length - drawn;
    more.hidden = left === 0;
    more.textContent = `Show ${Math.min(PAGE, left)} more of ${whole(left)}`;
  }

  function update() {
    const step = Number(slider.value) === 0 ? null : steps[slider.value - 1];
    const words = search.value.trim().toLowerCase();
    reading.value = step === null ? "all steps" : `step ${whole(step)}`;
    slider.setAttribute("aria-valuetext", reading.value);
    found = rows.filter((row, i) =>
      (step === null || row.step === step) &&
      (run.value === "" || row.run === Number(run.value)) &&
      (kind.value === "" || row.kind === kind.value) &&
      (!reflecting.checked || row.reflects > 0) &&
      (words === "" || haystacks[i].includes(words)));
    found.sort(ORDERS[sort.value]);
    count.textContent = found.length ? `${whole(found.length)} of the ${whole(rows.length)} completions in this page` : "No completion matches.";
    list.replaceChildren();
    drawn = 0;
    draw(PAGE);
  }

  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(update, 120);
  });
  for (const control of [run, kind, sort, reflecting]) control.addEventListener("change", update);
  slider.addEventListener("input", update);
  more.addEventListener("click", () => draw(drawn + PAGE));
  update();
  const controls = element("form", { class: "controls", role: "search" },
    labelled("Search", search, "wide"),
    labelled("Step", element("span", { class: "slider" }, slider, reading), "wide", "step"),
    runs.length > 1 ? labelled("Run", run) : null,
    labelled("Kind", kind),
    labelled("Sort by", sort),
    element("label", { class: "check" }, reflecting, " with reflection words only"));
  controls.addEventListener("submit", (event) => event.preventDefault());
  const show = (runNumber, step) => {
    run.value = runs.length > 1 ? runNumber : "";
    search.value = kind.value = "";
    reflecting.checked = true;
    slider.value = steps.indexOf(step) + 1;
    update();
    count.scrollIntoView({ block: "center" });
  };
  return { node: element("div", {}, controls, count, list, more), show };
}

function choice(id, options) {
  return element("select", { id }, options.map(([value, text]) => element("option", { value }, text)));
}

function labelled(text, control, look = null, id = control.id) {
  return element("div", { class: `field ${look ?? ""}` }, element("label", { for: id }, text), control);
}

function card(row, run, pattern, words) {
  const rewards = Object.entries(row.rewards).map(([name, value]) => fact(name, value));
  const look = row.advantage > 0 ? "better" : row.advantage < 0 ? "worse" : "";
  return element("article", { class: `completion ${look}` },
    element("header", {},
      element("span", {}, [run, `step ${whole(row.step)}`, row.kind].filter(Boolean).join(" · ")),
      element("span", { class: "reward" }, "reward ", element("b", {}, value(row.reward)))),
    element("p", { class: "question" }, row.question),
    element("p", { class: "gold" }, "Right answer: ", element("b", {}, row.answer)),
    element("pre", { tabindex: row.completion.length > 1500 ? 0 : null }, highlighted(row.completion, pattern, words)),
    element("ul", { class: "facts" }, rewards,
      fact("advantage", row.advantage, true), fact("tokens", row.length),
      row.finish_reason ? element("li", {}, `finish: ${row.finish_reason}`) : null));
}

function value(number, signed = false) {
  if (number === null) return "unknown";
  return (signed && number > 0 ? "+" : "") + short(number);
}

function fact(name, number, signed = false) {
  return element("li", {}, `${name} `, element("b", {}, value(number, signed)));
}

// Text with the searched words, reflection words and format tags marked.
function highlighted(text, pattern, words) {
  const escaped = words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const kinds = [["tag", "</?(?:think|answer)>"], ["reflects", pattern]];
  if (escaped) kinds.unshift(["found", escaped]);
  const any = new RegExp(kinds.map(([, source]) => `(${source})`).join("|"), "gi");
  const pieces = [];
  let end = 0;
  for (const match of text.matchAll(any)) {
    const which = kinds.findIndex((_, i) => match[i + 1] !== undefined);
    pieces.push(text.slice(end, match.index), element(kinds[which][0] === "tag" ? "span" : "mark", { class: kinds[which][0] }, match[0]));
    end = match.index + match[0].length;
  }
  return [...pieces, text.slice(end)].filter((piece) => piece !== "");
}
