// Checks who imports whom. Fails, too, when the tool saw no module: then it checked nothing.
import { cruise } from 'dependency-cruiser';
import config from '../.dependency-cruiser.mjs';

const { output } = await cruise(['dist'], { ...config.options, ruleSet: config, validate: true });
const { modules, summary } = output;
const ours = modules.filter(({ source }) => source.startsWith('dist/'));
const edges = ours.flatMap(({ dependencies }) => dependencies).length;
for (const { rule, from, to } of summary.violations) console.error(`${rule.name}: ${from} → ${to}`);
if (ours.length === 0 || edges === 0) console.error('No modules or imports were seen: build first.');
console.log(`${ours.length} modules, ${edges} imports, ${summary.error} violations`);
process.exit(summary.error > 0 || ours.length === 0 || edges === 0 ? 1 : 0);
