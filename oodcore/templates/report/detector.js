const [known, ...strangers] = page.sets;
const hue = at => `s${at % 5}`, dash = at => `k${at % 4}`;
const swatch = at => make("svg", {class: `swatch ${hue(at)} ${dash(at)}`, viewBox: "0 0 28 8", "aria-hidden": "true"}, make("path", {d: "M0 4h28"}));
const section = (title, ...children) => make("section", {}, make("h2", {}, title), ...children);

function copied(text, label) {
  const shown = make("pre", {tabindex: 0, role: "region", "aria-label": label}, text);
  const said = make("span", {class: "quiet", role: "status"});
  const button = make("button", {type: "button", class: "plain"}, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      said.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(shown);
      said.textContent = "selected; copy it with the keyboard";
    }
  });
  return make("div", {class: "copied"}, shown, make("div", {class: "below"}, button, said));
}

function words([kept, ...parts], className) {
  const nodes = parts.map((part, at) => at % 2 ? make("code", {}, part) : part);
  return make(kept ? "div" : "p", {class: [className, kept && "kept"].filter(Boolean).join(" ") || null}, nodes);
}

function cited(citation, url) {
  return make("p", {class: "cite"}, citation, " ", url ? make("a", {href: url, rel: "noopener noreferrer"}, url) : null);
}

function explained(method, alone) {
  return make("div", {class: "method"},
    make("h3", {}, alone ? method.slot : `${method.slot} `, alone ? " " : "", make("code", {}, method.kind)),
    method.about.map((paragraph, at) => words(paragraph, at === 0 ? "formula" : null)),
    method.citation ? cited(method.citation, method.url) : null,
    method.bibtex ? make("details", {}, make("summary", {}, "BibTeX"), copied(method.bibtex, `BibTeX of ${method.kind}`)) : null);
}

function bars(heights, className) {
  return make("path", {class: className, d: "M0 100" + heights.map(height => `V${100 - height}h10`).join("") + "V100z"});
}

function histogram(detector, at) {
  const [name, group, rows] = page.sets[at], [low, high] = detector.range;
  const bins = detector.histograms[0].length, limit = detector.threshold;
  return make("figure", {},
    make("figcaption", {}, at ? swatch(at - 1) : null, make("span", {}, at ? name : `${name} (ID)`, " ",
      make("span", {class: "quiet"}, [at ? group : "", `${rows.toLocaleString("en")} rows`].filter(Boolean).join(", ")))),
    make("svg", {class: "bars", viewBox: `0 0 ${10 * bins} 100`, preserveAspectRatio: "none", role: "img", "aria-label": at ? `Scores of ${known[0]} and of ${name}` : `Scores of ${name}`},
      bars(detector.histograms[0], "inside"),
      at ? bars(detector.histograms[at], `outside ${hue(at - 1)}`) : null,
      limit === null ? null : make("line", {class: "limit", x1: 10 * limit, x2: 10 * limit, y2: 100})),
    make("div", {class: "axis"}, make("span", {}, low), make("span", {}, high)));
}

function chart(title, across, up, label, paths, helpers = []) {
  return make("figure", {class: "chart"},
    make("h3", {}, title),
    make("div", {class: "frame"},
      make("span", {class: "up"}, up),
      make("svg", {viewBox: "0 0 500 500", role: "img", "aria-label": label},
        helpers.map(([className, x1, y1, x2, y2]) => make("line", {class: className, x1, y1, x2, y2})),
        paths.map((path, at) => make("path", {class: `line ${hue(at)} ${dash(at)}`, d: path}))),
      make("span", {class: "across"}, across)));
}

function numbers(detector, line) {
  const metrics = Object.entries(page.metrics).filter(([, metric]) => metric.values);
  const rows = page.columns.map(([title, own, , group], at) => ({title, own, group, at})).filter(row => !row.own);
  return make("div", {class: "scroll card", tabindex: 0, role: "region", "aria-label": `All numbers of ${detector.name}`},
    make("table", {class: "numbers"},
      make("thead", {}, make("tr", {}, make("th", {scope: "col"}, "OOD set"), metrics.map(([, {title}]) => make("th", {scope: "col"}, title)))),
      make("tbody", {}, rows.map(({title, group, at}) => make("tr", {},
        make("th", {scope: "row"}, title, " ", group && group !== "all" && !title.endsWith(" mean") ? make("span", {class: "quiet"}, group) : null),
        metrics.map(([, {texts}]) => make("td", {}, texts[line][at])))))));
}

function drawings(detector) {
  const sets = page.sets.map((_, at) => at);
  const parts = [section("Scores",
    make("ul", {class: "key"},
      make("li", {}, make("i", {class: "grey"}), `${known[0]} (ID)`),
      strangers.length ? make("li", {}, make("i", {class: "hue"}), "the OOD set") : null,
      detector.threshold === null ? null : make("li", {}, make("i", {class: "dash"}), "calibrated threshold: flagged to its left")),
    make("div", {class: "panels"}, (strangers.length ? sets.slice(1) : sets).map(at => histogram(detector, at))),
    make("p", {class: "quiet"}, "Further right is more in-distribution. Each histogram is scaled to its own tallest bin; the outermost bins also hold what lies beyond them."),
    page.basis ? make("p", {class: "quiet"}, page.basis) : null)];
  const charts = [], notes = [];
  if (detector.curves.length) {
    const [roc, ofInside, ofOutside] = [0, 1, 2].map(kind => detector.curves.map(curves => curves[kind]));
    charts.push(
      chart("ROC", "OOD accepted, 0 to 100 %", "ID accepted, 0 to 100 %", `ROC curves of ${detector.name}: share of ID accepted against share of OOD accepted`, roc,
        [["chance", 0, 500, 500, 0], ["level", 0, 25, 500, 25], ["level", 25, 0, 25, 500]]),
      chart("Precision and recall, ID positive", "recall of ID, 0 to 100 %", "precision, 0 to 100 %", `Precision against recall of ID inputs by ${detector.name}`, ofInside),
      chart("Precision and recall, OOD positive", "recall of OOD, 0 to 100 %", "precision, 0 to 100 %", `Precision against recall of OOD inputs by ${detector.name}`, ofOutside));
    notes.push("Dotted: 95 % of ID accepted, and 95 % of OOD flagged; where an ROC curve crosses them the two FPR95 are read. Precision depends on how many inputs of each kind there are.");
  }
  if (detector.coverage) {
    charts.push(chart("Accuracy over coverage", "inputs kept, 0 to 100 %", "accuracy on them, 0 to 100 %", `Accuracy of the predictions that ${detector.name} keeps, against how many it keeps`, [detector.coverage]));
    notes.push("The further left, the fewer inputs are kept, those with the highest scores. A score that knows which predictions are wrong keeps the curve high for long.");
  }
  if (charts.length) {
    parts.push(section("Curves",
      strangers.length ? make("ul", {class: "key"}, strangers.map(([name], at) => make("li", {}, swatch(at), name))) : null,
      make("div", {class: "charts"}, charts), notes.map(note => make("p", {class: "quiet"}, note))));
  }
  return parts;
}

function described(line) {
  const detector = page.detectors[line], {headline, alone} = detector;
  const before = page.detectors[line - 1], after = page.detectors[line + 1];
  const methods = detector.methods.map(at => page.methods[at]);
  const step = (other, text) => other ? make("a", {href: `#${other.anchor}`, title: other.name}, text) : make("span", {class: "quiet"}, text);
  const facts = [["Rank", `${line + 1} of ${page.detectors.length}`], ...headline.map(([title, text]) => [title, `${text} %`]),
    ...alone.filter(([title]) => !headline.some(([other]) => other === title)).map(([title, text]) => [`${title} on ${known[0]}`, `${text} %`])];
  return [
    make("nav", {class: "way", "aria-label": "Detectors"}, make("a", {href: "#comparison"}, "\u2190 All detectors"),
      make("span", {}, step(before, "\u2039 better"), " \u00b7 ", step(after, "worse \u203a"))),
    make("header", {}, make("h1", {tabindex: -1}, detector.short),
      make("p", {class: "lead"}, `${severalModels ? `On the model ${detector.model}, ranked` : "Ranked"} by ${page.mean ? "mean " : ""}${page.main}.`),
      make("ul", {class: "facts"}, facts.map(([title, text]) => make("li", {class: "card"}, make("span", {class: "quiet"}, title[0].toUpperCase() + title.slice(1)), make("b", {}, text))))),
    make("div", {class: "halves"},
      methods.length || detector.citation ? section("What it computes",
        methods.map(method => explained(method, methods.length === 1)),
        detector.citation ? cited(detector.citation, detector.url) : null) : null,
      detector.configuration || detector.seconds !== null ? section("Configuration",
        detector.configuration ? copied(detector.configuration, `Configuration of ${detector.name}`) : null,
        detector.seconds === null ? null : make("p", {class: "quiet"}, `Its scorer took ${detector.seconds} s for all rows, besides the passes through the model.`)) : null),
    strangers.length ? section("All numbers, in percent", numbers(detector, line)) : null,
    ...drawings(detector),
  ];
}
