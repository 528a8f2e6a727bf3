// What a page needs besides its own text.

// What is wider than the window is scrolled, with keys as well. The theme sees to code,
// but only a while after the window has changed.
const reachable = () => {
  for (const part of document.querySelectorAll(".drawing, .cell_output, pre, p:has(> img)")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
};
addEventListener("load", reachable);
addEventListener("resize", reachable);

// On paper nothing can be unfolded: answers, hints and outcomes stand at the end, and
// what only explains is open where it is.
const AT_THE_END = /^(Answer|A sample answer|Solution|Hint|Show what comes out|Show the solution)/;
let back = [];

addEventListener("beforeprint", () => {
  const article = document.querySelector("article.bd-article");
  if (!article || back.length) return;
  const end = document.createElement("section");
  end.className = "answers";
  end.innerHTML = "<h2>Answers</h2>";
  for (const part of article.querySelectorAll("details:not(details details)")) {
    const name = part.querySelector("summary").innerText.trim();
    const moved = AT_THE_END.test(name);
    const code = /^Show the code/.test(name);
    if (code || (part.open && !moved)) continue;
    const was = part.open;
    part.open = true;
    if (!moved) {
      back.push(() => (part.open = was));
      continue;
    }
    const number = end.querySelectorAll("details").length + 1;
    const what = name.replace(/^Show (.)/, (_, letter) => letter.toUpperCase());
    const place = document.createElement("p");
    place.className = "asked";
    place.textContent = `${what}: number ${number} at the end. `;
    const heading = document.createElement("p");
    heading.innerHTML = "<strong></strong>";
    heading.firstChild.textContent = `${number}. ${what}`;
    part.replaceWith(place);
    part.classList.add("moved");
    // Code that only draws isn't printed where it stands, either.
    part.classList.toggle("outcome", name.startsWith("Show what"));
    end.append(heading, part);
    back.push(() => {
      part.open = was;
      part.classList.remove("moved", "outcome");
      place.replaceWith(part);
    });
  }
  if (!end.querySelector("details")) return;
  const hints = [...end.querySelectorAll("p > strong")].every((one) => /Hint/.test(one.innerText));
  if (hints) end.querySelector("h2").textContent = "Hints";
  article.append(end);
  back.push(() => end.remove());
});

addEventListener("afterprint", () => {
  for (const undo of back) undo();
  back = [];
});
