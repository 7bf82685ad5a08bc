/**
 * The numbers of our Postgres advisory locks, all in one place so that no two meanings share one.
 * The two-number form keeps them apart from locks that others may take in the same database.
 */
const NAMESPACE = 0x4d757374; // "Must"

export const LOCKS = {
  /** Held while migrations run. */
  migrations: [NAMESPACE, 1],
  /** Held, by its session, by the one process that relays events. */
  relayLeader: [NAMESPACE, 2],
  /** Held, by its transaction, while events get their place: the fence behind the leader lock. */
  relayOrder: [NAMESPACE, 3],
  /** Held, by its transaction, while the first admin is made. */
  firstAdmin: [NAMESPACE, 4],
  /** Held, by its transaction, while entries of the audit log get their places in its chains. */
  auditSeal: [NAMESPACE, 5],
  /** Held, by its transaction, while a schedule file is applied. */
  scheduleFile: [NAMESPACE, 6],
} as const satisfies Record<string, readonly [number, number]>;

/** The first number of the locks that claims of runs take, by owner, until their transaction ends. */
export const CLAIM_LOCKS = 0x4d757375;
