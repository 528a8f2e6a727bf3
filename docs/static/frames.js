// Pictures with sliders (tools/frames.py): a frame for each place of the sliders.
document.addEventListener("DOMContentLoaded", () => {
  for (const picture of document.querySelectorAll(".frames")) {
    const frames = JSON.parse(picture.querySelector("script").textContent);
    const sliders = [...picture.querySelectorAll("input")];
    const show = () => {
      let place = 0;
      for (const slider of sliders) {
        const label = JSON.parse(slider.dataset.labels)[slider.value];
        place = place * (Number(slider.max) + 1) + Number(slider.value);
        slider.setAttribute("aria-valuetext", label);
        slider.nextElementSibling.value = label;
      }
      picture.querySelector("img").src = frames[place];
    };
    for (const slider of sliders) slider.addEventListener("input", show);
    show();
  }
});
