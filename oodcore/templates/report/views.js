(() => {
  const overview = document.getElementById("overview"), view = document.getElementById("view");
  const title = document.title;
  const lines = new Map(page.detectors.map((detector, line) => [detector.anchor, line]));
  let shown = null, left = 0;

  function address() {
    try {
      return decodeURIComponent(location.hash.slice(1));
    } catch {
      return location.hash.slice(1);
    }
  }
  function go() {
    const line = lines.get(address());
    if (line === undefined) back();
    else open(line);
  }
  function open(line) {
    if (shown === null) left = scrollY;
    const first = shown === null && document.readyState === "loading";
    shown = line;
    view.replaceChildren(...described(line).filter(Boolean));
    overview.hidden = true;
    view.hidden = false;
    document.title = `${page.detectors[line].name} \u00b7 ${title}`;
    scrollTo(0, 0);
    if (!first) view.querySelector("h1").focus({preventScroll: true});
  }
  function back() {
    if (shown === null) return;
    const line = shown;
    shown = null;
    overview.hidden = false;
    view.hidden = true;
    view.replaceChildren();
    document.title = title;
    if (["", "comparison"].includes(address())) {
      scrollTo(0, left);
      document.querySelector(`a[href="#${CSS.escape(page.detectors[line].anchor)}"]`)?.focus({preventScroll: true});
    } else {
      document.getElementById(address())?.scrollIntoView();
    }
  }
  addEventListener("hashchange", go);
  document.documentElement.classList.add("script");
  go();
})();
