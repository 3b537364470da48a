// The open questions to people, each with its two answers. All text is inserted as text.

const at = (id) => document.getElementById(id);

export function showApprovals(approvals, { answer, open }) {
  at("approvals").hidden = approvals.length === 0;
  const known = new Map([...at("approval-rows").children].map((row) => [row.dataset.approval, row]));
  // A row that stays is left alone: somebody may be typing into it.
  const rows = approvals.map((approval) => known.get(approval.approval_id) ?? newRow(approval, { answer, open }));
  const isSame = rows.length === at("approval-rows").children.length && rows.every((row, i) => row === at("approval-rows").children[i]);
  if (!isSame) at("approval-rows").replaceChildren(...rows);
}

function newRow(approval, { answer, open }) {
  const row = at("approval-row").content.firstElementChild.cloneNode(true);
  const part = (name) => row.querySelector(`.${name}`);
  row.dataset.approval = approval.approval_id;
  part("title").textContent = approval.title;
  part("agent").textContent = approval.agent;
  part("agent").addEventListener("click", () => open(approval.run_id, approval.agent));
  part("arguments").textContent = approval.arguments === null ? "" : JSON.stringify(approval.arguments, null, 2);
  part("arguments").hidden = approval.arguments === null;
  part("schema").textContent = JSON.stringify(approval.answer_schema);
  part("data").hidden = approval.answer_schema === null;
  for (const decision of ["allow", "deny"]) {
    part(decision).addEventListener("click", () => decide(row, decision, answer));
  }
  return row;
}

async function decide(row, decision, answer) {
  const part = (name) => row.querySelector(`.${name}`);
  const buttons = [part("allow"), part("deny")];
  for (const button of buttons) button.disabled = true;
  try {
    const text = part("answer").value.trim();
    await answer(row.dataset.approval, { decision, data: text ? JSON.parse(text) : null });
    row.remove();
  } catch (error) {
    part("fault").textContent = error.message;
    for (const button of buttons) button.disabled = false;
  }
}
