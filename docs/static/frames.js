// Pictures with sliders and menus (tools/frames.py): a frame for each of their places.
document.addEventListener("DOMContentLoaded", () => {
  for (const picture of document.querySelectorAll(".frames")) {
    const frames = JSON.parse(picture.querySelector("script").textContent);
    const controls = [...picture.querySelectorAll("input, select")];
    const show = () => {
      let place = 0;
      for (const control of controls) {
        if (control.options) {
          place = place * control.options.length + control.selectedIndex;
          continue;
        }
        const label = JSON.parse(control.dataset.labels)[control.value];
        place = place * (Number(control.max) + 1) + Number(control.value);
        control.setAttribute("aria-valuetext", label);
        control.nextElementSibling.value = label;
      }
      picture.querySelector("img").src = frames[place];
    };
    for (const control of controls) control.addEventListener("input", show);
    show();
  }
});
