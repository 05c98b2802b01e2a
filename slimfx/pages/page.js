// A button in a heading sorts its table by that column, and again the other way round.
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
  const heading = button.parentElement;
  const body = heading.closest("table").tBodies[0];
  const column = heading.cellIndex;
  const number = heading.classList.contains("n");
  const before = heading.getAttribute("aria-sort");
  const down = before === "ascending" || (number && before === "none");
  const value = (row) => {
    const text = row.cells[column].textContent.trim();
    if (!number) return text;
    return text === "\u221e" ? Infinity : parseFloat(text.replaceAll(",", ""));
  };
  const order = (a, b) => number ? a - b : a.localeCompare(b, "en", { numeric: true });
  const missing = (key) => number ? Number.isNaN(key) : key === "";
  const rows = Array.from(body.rows, (row) => [value(row), row]);
  rows.sort(([a], [b]) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b);  // last, either way round
    return down ? order(b, a) : order(a, b);
  });
  body.append(...rows.map(([, row]) => row));
  for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
}));
