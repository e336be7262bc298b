const table = (() => {
  const scores = document.getElementById("scores"), body = scores.tBodies[0];
  const [spanning, naming] = scores.tHead.rows;
  const heads = [...naming.cells];
  const words = heads.length - page.columns.length;
  const inside = page.sets[0][0];
  const lines = [...body.rows].map((row, index) => {
    const detector = page.detectors[index];
    return {row, index, detector, found: `${detector.name} ${detector.model}`.toLowerCase(), cells: [...row.cells].slice(words)};
  });
  const spans = [];
  for (const cell of [...spanning.cells].slice(1)) {
    const first = spans.length ? spans.at(-1).first + spans.at(-1).count : 0;
    spans.push({cell, first, count: cell.colSpan});
  }
  let metric = Object.keys(page.metrics)[0], shown = page.columns.map(() => true);
  let sorted = {column: words, up: natural(words)};

  function value(line, column) {
    if (column === 0) return line.detector.short;
    return column < words ? line.detector.model : page.metrics[metric].values[line.index][column - words];
  }
  // A first click puts the best on top, whichever end that is.
  function natural(column) {
    if (column < words) return true;
    return page.metrics[page.columns[column - words][1] || metric].better !== "higher";
  }
  function sort(column, up) {
    sorted = {column, up};
    heads.forEach((head, at) => at === column
      ? head.setAttribute("aria-sort", up ? "ascending" : "descending") : head.removeAttribute("aria-sort"));
    lines.sort((a, b) => {
      const x = value(a, column), y = value(b, column);
      if (x === null || y === null) return (x === null) - (y === null) || a.index - b.index;
      const order = typeof x === "string" ? x.localeCompare(y) : x - y;
      return (up ? order : -order) || a.index - b.index;
    });
    body.append(...lines.map(line => line.row));
  }
  function tint(name, column, number) {
    if (number === null || page.columns[column][2] === inside) return 0;
    if (name === "auroc") return Math.max(2 * number - 1, 0);
    return page.metrics[name].better === "higher" ? number : 1 - number;
  }
  function bestText(name, column) {
    const {values, texts} = page.metrics[metric], better = page.metrics[name].better;
    const measured = lines.filter(line => values[line.index][column] !== null);
    // What is written decides: numbers that look alike are alike. A spread is not compared.
    const written = new Set(measured.map(line => texts[line.index][column].split(" ")[0]));
    if (better === null || written.size < 2) return null;
    const sign = better === "higher" ? 1 : -1;
    const top = measured.reduce((a, b) => sign * values[b.index][column] > sign * values[a.index][column] ? b : a);
    return texts[top.index][column].split(" ")[0];
  }
  function show(name) {
    metric = name;
    const {title, better, values, texts} = page.metrics[name];
    if (document.getElementById("title")) {
      document.getElementById("title").textContent = title;
      document.getElementById("better").textContent = better;
    }
    page.columns.forEach(([, own], column) => {
      const best = bestText(own || name, column);
      for (const line of lines) {
        const cell = line.cells[column], text = texts[line.index][column];
        cell.textContent = text;
        cell.style.setProperty("--t", tint(own || name, column, values[line.index][column]));
        cell.classList.toggle("best", best !== null && text.split(" ")[0] === best);
      }
    });
    sort(sorted.column, sorted.column < words ? sorted.up : natural(sorted.column));
  }
  function showGroups(groups) {
    const inAll = ([, own, data, group]) => own !== "" || ((data === "mean" || data === "pooled") && group === "all");
    shown = page.columns.map(column => inAll(column) || groups.has(column[3]));
    page.columns.forEach((_, at) => {
      heads[words + at].hidden = !shown[at];
      for (const line of lines) line.cells[at].hidden = !shown[at];
    });
    for (const {cell, first, count} of spans) {
      const left = shown.slice(first, first + count).filter(Boolean).length;
      cell.hidden = left === 0;
      cell.colSpan = Math.max(left, 1);
    }
    if (sorted.column >= words && !shown[sorted.column - words]) {
      const column = words + shown.indexOf(true);
      sort(column, natural(column));
    }
  }
  function filter() {
    const chosen = id => document.getElementById(id)?.value ?? "";
    const wanted = chosen("words").toLowerCase().split(/\s+/), kind = chosen("kind"), model = chosen("model");
    let found = 0;
    for (const line of lines) {
      const {detector} = line;
      const fits = wanted.every(word => line.found.includes(word))
        && (!kind || detector.kinds.includes(kind)) && (!model || detector.model === model);
      line.row.hidden = !fits;
      found += fits;
    }
    document.getElementById("count").textContent = found < lines.length ? `${found} of ${lines.length}` : "";
  }
  function everything() {
    const rows = [["detector", "model", "data", "group", "metric", "value"]];
    page.detectors.forEach(({name, model}, line) => page.columns.forEach(([, own, data, group], at) => {
      for (const [each, {values}] of Object.entries(page.metrics)) {
        if (!values || (own && each !== metric)) continue;
        if (values[line][at] !== null) rows.push([name, model, data, group, own || each, values[line][at]]);
      }
    }));
    const quoted = cell => /[",\r\n]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : cell;
    return rows.map(row => row.map(quoted).join(",")).join("\n") + "\n";
  }

  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () =>
    sort(column, column === sorted.column ? !sorted.up : natural(column))));
  document.getElementById("choice")?.addEventListener("change", event => show(event.target.value));
  document.getElementById("groups")?.addEventListener("change", event => showGroups(
    new Set([...event.currentTarget.querySelectorAll(":checked")].map(box => box.value))));
  document.getElementById("words").addEventListener("input", filter);
  for (const id of ["kind", "model"]) document.getElementById(id)?.addEventListener("change", filter);
  document.getElementById("download").addEventListener("click", () => {
    const link = make("a", {download: "results.csv"});
    link.href = URL.createObjectURL(new Blob([everything()], {type: "text/csv"}));
    link.click();
    URL.revokeObjectURL(link.href);
  });
  for (const box of document.querySelectorAll("#layers input")) {
    box.addEventListener("change", () => document.querySelectorAll(`[data-set="${box.value}"]`)
      .forEach(cloud => cloud.toggleAttribute("hidden", !box.checked)));
  }
  // A reloaded page may come back with another choice than the first.
  show(document.querySelector("#choice :checked")?.value ?? metric);
  return {everything};
})();
