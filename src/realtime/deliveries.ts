import { CREDENTIALS_TOPIC, type Identity, type StillGood } from '../http/authenticate.ts';
import { Problem } from '../http/problem.ts';
import type { Bus } from '../platform/bus.ts';
import { CLOSE } from './close-codes.ts';
import { Delivery, type DeliveryDeps, type Hello, RHYTHM, type Wire } from './delivery.ts';

// The clients of this process that follow events: how many there may be, that each is looked after, and that none outlives
// its credential: whatever ends a credential rings, and all of them are looked up every few seconds besides, in one query,
// since a ring may be lost and a user may be disabled by hand.

export interface Deliveries {
  /** Throws the 429 problem when the user or the address has too many already. */
  admit(userId: number, address: string): void;
  /** Counts a delivery in. Its wire's end must be told by `ended`. */
  open(wire: Wire, address: string, hello: Hello): Delivery;
  ended(delivery: Delivery): void;
  counts(): { connections: number; users: number; subscriptions: Record<string, number> };
  /** Closes every one with 1001, also those that are opened from now on; resolves when the present ones are closed. */
  closeAll(): Promise<void>;
}

/** The deliveries of this process. */
export function createDeliveries(
  given: Omit<DeliveryDeps, 'turn'> & { bus: Bus; stillGood: StillGood },
  rhythm: typeof RHYTHM = RHYTHM,
): Deliveries {
  const deps = { ...given, turn: takingTurns() };
  const { config, feed, bus, logger, stillGood } = deps;
  const present = new Map<Delivery, string>();
  let whenEmpty: (() => void) | undefined;
  const perUser = counter();
  const perAddress = counter();
  let closing = false;
  const goAway = (delivery: Delivery) => delivery.shut(CLOSE.goingAway, 'server going away');

  const recheck = async () => {
    // A credential may have many connections.
    const asked = new Map<string, Identity>();
    for (const { identity } of present.keys()) asked.set(credentialOf(identity), identity);
    const good = await stillGood([...asked.values()]);
    const ended = new Set([...asked.keys()].filter((_, i) => !good[i]));
    if (ended.size === 0) return;
    for (const delivery of present.keys()) {
      // One that was renewed meanwhile has another credential.
      if (ended.has(credentialOf(delivery.identity))) {
        delivery.shut(CLOSE.policy, 'the credential is not good any more');
      }
    }
  };
  let checking = false;
  let checkAgain = false;
  let checkedAt = performance.now();
  const look = () => {
    if (checking) {
      checkAgain = true;
      return;
    }
    checking = true;
    checkAgain = false;
    checkedAt = performance.now();
    recheck()
      // Without the database nothing is known, and nothing is delivered either.
      .catch((error: unknown) => logger.debug({ err: error }, 'credentials were not looked up again'))
      .finally(() => {
        checking = false;
        if (checkAgain) look();
      });
  };
  const tendAll = async () => {
    let tended = 0;
    for (const delivery of present.keys()) {
      guard(delivery, () => delivery.tend(performance.now()));
      // Ten thousand pings at once would hold everything else up.
      if (++tended % TENDED_AT_ONCE === 0) await new Promise((done) => setImmediate(done));
    }
  };
  let isTending = false;
  const tending = setInterval(() => {
    if (present.size > 0 && performance.now() - checkedAt >= rhythm.recheck) look();
    if (isTending) return;
    isTending = true;
    void tendAll().finally(() => {
      isTending = false;
    });
  }, rhythm.tend);
  tending.unref();
  const offCredentials = bus.on(CREDENTIALS_TOPIC, () => {
    if (present.size > 0) look();
  });
  const offAway = feed.onAway(() => {
    for (const delivery of present.keys()) guard(delivery, () => delivery.tellAway());
  });

  return {
    admit(userId, address) {
      const refuse = (what: string) =>
        new Problem('rate-limited', `There are too many connections ${what}: close some of them.`, {
          headers: { 'retry-after': '10' },
        });
      if (perUser.of(userId) >= config.WS_MAX_CONNECTIONS_PER_USER) throw refuse('of this user');
      if (perAddress.of(address) >= config.WS_MAX_CONNECTIONS_PER_ADDRESS) throw refuse('from this address');
    },
    open(wire, address, hello) {
      const delivery = new Delivery(deps, rhythm, wire, hello);
      present.set(delivery, address);
      perUser.add(hello.identity.userId, 1);
      perAddress.add(address, 1);
      if (closing) goAway(delivery);
      return delivery;
    },
    ended(delivery) {
      const address = present.get(delivery);
      if (address === undefined) return;
      present.delete(delivery);
      delivery.gone();
      perUser.add(delivery.identity.userId, -1);
      perAddress.add(address, -1);
      if (present.size === 0) whenEmpty?.();
    },
    counts() {
      const subscriptions: Record<string, number> = {};
      for (const { subscription } of present.keys()) {
        for (const topic of subscription.topics()) subscriptions[topic] = (subscriptions[topic] ?? 0) + 1;
      }
      return { connections: present.size, users: perUser.size(), subscriptions };
    },
    async closeAll() {
      closing = true;
      clearInterval(tending);
      offCredentials();
      offAway();
      if (present.size === 0) return;
      const empty = new Promise<void>((resolve) => {
        whenEmpty = resolve;
      });
      for (const delivery of [...present.keys()]) goAway(delivery);
      await empty;
    },
  };
}

/** Does what concerns one client so that its fault reaches no other. */
function guard(delivery: Delivery, work: () => void): void {
  try {
    work();
  } catch (error) {
    delivery.fail(error);
  }
}

/** How many are looked after before other things get on. */
const TENDED_AT_ONCE = 250;

/** What tells credentials, and the rights they were given, apart. */
const credentialOf = ({ userId, role, apiKeyId, family }: Identity) => `${userId} ${role} ${apiKeyId} ${family}`;

/** How many stretches of work are done before other things get on. */
const TURNS_AT_ONCE = 4;

function takingTurns(): () => Promise<void> {
  const waiting: (() => void)[] = [];
  let scheduled = false;
  const next = () => {
    scheduled = waiting.length > TURNS_AT_ONCE;
    for (const go of waiting.splice(0, TURNS_AT_ONCE)) go();
    if (scheduled) setImmediate(next);
  };
  return () =>
    new Promise((resolve) => {
      waiting.push(resolve);
      if (scheduled) return;
      scheduled = true;
      setImmediate(next);
    });
}

function counter() {
  const counts = new Map<unknown, number>();
  return {
    of: (key: unknown) => counts.get(key) ?? 0,
    add(key: unknown, n: number) {
      const count = (counts.get(key) ?? 0) + n;
      if (count > 0) counts.set(key, count);
      else counts.delete(key);
    },
    size: () => counts.size,
  };
}
