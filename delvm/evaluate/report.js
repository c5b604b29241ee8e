"use strict";
// A button in every column's header: it sorts by that column, pressed again the other way round.
for (const header of document.querySelectorAll("table.sortable thead tr:last-child th")) {
  if (!header.textContent.trim()) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  header.append(button);
  button.addEventListener("click", () => sort(header));
}

function sort(header) {
  const table = header.closest("table");
  const body = table.tBodies[0];
  const place = header.cellIndex;
  const order = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  const sign = order === "ascending" ? 1 : -1;
  const rows = [...body.rows].sort((a, b) => compare(a.cells[place], b.cells[place], sign));
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
  table.dataset.sorted = "";
  body.append(...rows);
}

function compare(a, b, sign) {
  const [x, y] = [a, b].map((cell) => parseFloat(cell.dataset.value ?? cell.textContent));
  if (!isNaN(x) && !isNaN(y)) return sign * (x - y);
  if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1; // what has no number comes last
  return sign * a.textContent.trim().localeCompare(b.textContent.trim());
}
