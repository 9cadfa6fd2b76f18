// The explorer's data from the server: the targets it was given, or one typed in here.
async function ask(path, options) {
  const answer = await fetch(path, options);
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.error || `The server answered with status ${answer.status}.`);
  return body;
}

const explorer = explore({
  targets: async () => (await ask("/api/targets")).targets,
  target: (row) => ask(`/api/target/${row}`),
});

document.getElementById("own-target").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = (id) => document.getElementById(id).value;
  explorer.show(ask("/api/score", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ prompt: value("own-prompt"), response: value("own-response") }),
  }));
});
