// A table: {caption, note, columns, rows: [{label, note, paper, cells}]}. Wide ones scroll within their frame.

function tableFigure(table) {
  const head = element("tr", {}, element("td", {}), table.columns.map((name) => element("th", { scope: "col" }, name)));
  const body = table.rows.map((row) =>
    element("tr", { class: row.paper ? "paper" : null },
      element("th", { scope: "row" }, row.label,
        row.paper ? element("span", { class: "badge" }, "paper") : null,
        row.note ? element("small", {}, row.note) : null),
      row.cells.map((cell) => element("td", {}, cell))),
  );
  return element("figure", { class: "table" },
    element("figcaption", {}, table.caption, table.note ? element("span", { class: "unit" }, ` ${table.note}`) : null),
    element("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": table.caption },
      element("table", {}, element("thead", {}, head), element("tbody", {}, body))));
}

// The only row of a table as tiles.
function tiles(table) {
  const [row] = table.rows;
  const known = table.columns.map((name, i) => [name, row.cells[i]]).filter(([, cell]) => cell);
  if (!known.length) return null;
  return element("figure", { class: "table" },
    element("figcaption", {}, table.caption, element("span", { class: "unit" }, ` ${table.note}`)),
    element("dl", { class: "tiles" }, known.map(([name, cell]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, cell)))));
}
