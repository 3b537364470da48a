// A black-box client: reads the contracts from protos/ on disk and uses the platform as another team's service would.
// It prints one JSON object; the test beside it judges that. Input: MAINSPRING_CLIENT, a JSON object.
'use strict';

const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const { protos, targets, token, agent, input } = JSON.parse(process.env.MAINSPRING_CLIENT);
const DEADLINE_MS = 15_000;

const definition = loader.loadSync(
  ['mainspring/v1/execution.proto', 'mainspring/v1/state.proto', 'google/rpc/error_details.proto'],
  {
    includeDirs: [protos, path.join(protos, 'third_party')],
    keepCase: true,
    longs: Number,
    enums: String,
    defaults: true,
    oneofs: true,
  },
);
const { mainspring } = grpc.loadPackageDefinition(definition);
const credentials = grpc.credentials.createInsecure();
const clients = {
  execution: new mainspring.v1.ExecutionService(targets.execution, credentials),
  state: new mainspring.v1.StateService(targets.state, credentials),
};

function metadata(bearer = token) {
  const found = new grpc.Metadata();
  if (bearer) found.set('authorization', `Bearer ${bearer}`);
  return found;
}

const options = () => ({ deadline: Date.now() + DEADLINE_MS });

function call(service, method, request, bearer = token) {
  return new Promise((resolve, reject) => {
    const answered = (error, answer) => (error ? reject(error) : resolve(answer));
    clients[service][method](request, metadata(bearer), options(), answered);
  });
}

// What a client can tell a refusal by: the code, and the details of google.rpc.Status.
async function refusal(promise) {
  const error = await promise.then(() => { throw new Error('the call was not refused'); }, (raised) => raised);
  const [bytes] = error.metadata ? error.metadata.get('grpc-status-details-bin') : [];
  if (!bytes) throw error;
  const status = definition['google.rpc.Status'].deserialize(bytes);
  const details = {};
  for (const { type_url: url, value } of status.details) {
    const name = url.split('/').pop();
    details[name.split('.').pop()] = definition[name].deserialize(value);
  }
  return { code: grpc.status[error.code], message: status.message, details };
}

// Every event of a run from the first to the terminal one, as they come.
function follow(runId) {
  return new Promise((resolve, reject) => {
    const stream = clients.state.Follow(metadata(), options());
    const events = [];
    let stateId = '';
    stream.on('data', (frame) => {
      stateId = frame.state_id || stateId;
      for (const delivery of frame.deliveries) {
        if (delivery.status) reject(new Error(delivery.status.message));
        events.push(...delivery.events);
      }
      if (events.some((event) => event.payload === 'agent_completed')) stream.end();
    });
    stream.on('error', reject);
    stream.on('end', () => resolve({ events, stateId }));
    stream.write({ subscribe: [{ subscription_id: 1, run_id: runId, after_seq: 0 }] });
  });
}

const inBrief = (events) => events.map((event) => ({ seq: event.seq, payload: event.payload, run_id: event.run_id }));

async function main() {
  const started = await call('execution', 'StartRun', { agent, input: Buffer.from(JSON.stringify(input)) });
  const followed = await follow(started.run_id);
  const { run } = await call('state', 'WaitRun', { run_id: started.run_id, timeout: { seconds: 10, nanos: 0 } });
  const read = await call('state', 'ReadEvents', { run_id: started.run_id, page_size: 100 });
  const unknown = '00000000-0000-7000-8000-000000000000';
  return {
    started,
    followed: inBrief(followed.events),
    state_id: followed.stateId,
    run: { run_id: run.run_id, state: run.state, result: run.result.toString() },
    read: inBrief(read.events),
    last_seq: read.last_seq,
    refused: {
      unknown_run: await refusal(call('state', 'GetRun', { run_id: unknown })),
      broken_rule: await refusal(call('state', 'ReadEvents', { run_id: started.run_id, page_size: -1 })),
      unknown_agent: await refusal(call('execution', 'StartRun', { agent: 'nobody' })),
      no_token: await refusal(call('state', 'ListRuns', {}, '')),
      later: await refusal(call('state', 'GetValue', {})),
    },
  };
}

main().then(
  (told) => { process.stdout.write(JSON.stringify(told)); Object.values(clients).forEach((client) => client.close()); },
  (error) => { process.stderr.write(`${error.stack}\n`); process.exit(1); },
);
