// Everything is in the page already: the slider only chooses what of it is shown.
const slider = document.getElementById("at");

function show() {
  const place = slider.value;
  const [step, words] = JSON.parse(slider.dataset.steps)[place];
  for (const one of document.querySelectorAll("[data-at]")) one.hidden = one.dataset.at !== place;
  for (const one of document.querySelectorAll(".words")) one.textContent = words;
  for (const { dataset, style } of document.querySelectorAll(".now")) {
    const part = Math.min(step / dataset.last, 1);
    style.visibility = "visible";
    style.transform = `translateX(${+dataset.left + part * (dataset.right - dataset.left)}px)`;
  }
  slider.setAttribute("aria-valuetext", words);
}

if (slider) {
  slider.addEventListener("input", show);
  show(); // a browser that goes back to the page puts the slider where it was
}
