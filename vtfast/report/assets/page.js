// Builds the page from the data.

function section(id, title, lead, ...children) {
  const content = children.flat().filter((child) => child !== null);
  if (!content.length) return null;
  return element("section", { id, "aria-labelledby": `${id}-title` },
    element("h2", { id: `${id}-title` }, title), lead ? element("p", { class: "lead" }, lead) : null, content);
}

function grid(charts) {
  return charts.length ? element("div", { class: "grid" }, charts.map(chartFigure)) : null;
}

function closed(summary, ...children) {
  return element("details", {}, element("summary", {}, summary), ...children);
}

function notes(runs) {
  const lines = runs.flatMap((run) => run.notes.map((note) => (runs.length > 1 ? `${run.name}: ${note}` : note)));
  return lines.length ? element("ul", { class: "notes", "aria-label": "Notes" }, lines.map((line) => element("li", {}, line))) : null;
}

function evaluationTables(data) {
  const tables = data.paper_tables.map(tableFigure);
  if (data.evaluated) return tables;
  return [
    element("p", {}, "No evaluations in these runs yet: ", element("code", {}, "vtfast eval"), " writes them into the run folder."),
    closed("The study's own numbers", tables),
  ];
}

function reflectionPart(data, browser) {
  const dated = data.reflection.dated.map(({ run, text, step }, number) =>
    element("li", {}, data.runs.length > 1 ? `${run}: ` : "", text, step === null ? null : jump(() => browser.show(number, step))));
  return [
    element("ul", { class: "dated" }, dated),
    element("p", { class: "lead" }, "Words that are counted: ", data.reflection.words.map((word) => [element("mark", { class: "reflects" }, word), " "]).flat(),
      "(whole words in any case, with their endings). They are a sign of reflection, not a proof; the completions below show each in its place."),
    grid(data.reflection.charts),
  ];
}

function jump(action) {
  const button = element("button", { type: "button", class: "jump" }, "Show these");
  button.addEventListener("click", action);
  return button;
}

function main() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const several = data.runs.length > 1;
  const { rows, total } = data.completions;
  const browser = completionBrowser(rows, data.runs.map((run) => run.name), data.reflection.pattern);
  const sample = rows.length < total
    ? `The page holds ${whole(rows.length)} of ${whole(total)} completions: from steps at even distances the best, the worst, some with reflection words and some others. The charts of reflection words count all of them.`
    : `All ${whole(total)} completions.`;
  const sections = [
    section("overview", "Overview", null, notes(data.runs), several ? tableFigure(data.overview) : tiles(data.overview), data.held_out.map(tableFigure)),
    several ? section("settings", "Settings", null, tableFigure(data.differing)) : null,
    section("figure-1", "Accuracy and length",
      data.by_freezing ? "As in Figures 1 and 4 of the study: the length of the answers is labelled by what was frozen."
        : data.accuracy.length ? "As in Figure 1 of the study." : "As in Figure 1 of the study; accuracies appear once there are evaluations.",
      grid([...data.accuracy, ...data.length])),
    section("training", "Training", "Thin lines are single steps, thick ones their running mean.", grid(data.training),
      data.zero.length ? element("p", { class: "lead" }, `Zero at every step: ${data.zero.join(", ").toLowerCase()}.`) : null),
    section("time", "Time and speed", null, grid(data.time)),
    section("evaluations", "Evaluations", data.evaluated ? "In each table the study's own figures come first, marked as the paper's." : null, evaluationTables(data)),
    total ? section("reflection", "Reflection", null, reflectionPart(data, browser)) : null,
    total ? section("completions", "Completions", sample, browser.node) : null,
    section("all-settings", "All settings", null, data.settings.map((table) => closed(table.caption, tableFigure(table)))),
  ].filter((part) => part !== null);
  document.title = `${data.title}: vtfast report`;
  document.getElementById("header").append(
    element("h1", {}, data.title),
    several ? element("p", {}, `${data.runs.length} runs`) : element("p", {}, [data.runs[0].status, data.runs[0].model, data.runs[0].data].filter(Boolean).join(" · ")),
    element("nav", { "aria-label": "Sections" }, sections.map((part) => element("a", { href: `#${part.id}` }, part.querySelector("h2").textContent))));
  document.getElementById("main").append(...sections);
}

main();
