//! Starts a process that dies with this one.
//!
//! On Linux the kernel can be told to kill a child when its parent goes (`PR_SET_PDEATHSIG`), also when
//! the parent was killed with -9 and could not clean up. Two traps come with it:
//!
//! - It must be asked for in the child, between fork and exec. The only door to that is `pre_exec`, which
//!   is unsafe: what runs there must be async-signal-safe. These are two system calls without
//!   allocation or locks.
//! - "Parent" means the *thread* that forked, not the process. A child started by a short-lived thread (a
//!   test, a blocking pool) would die with that thread. So one thread, which never ends, starts them all.

#![allow(unsafe_code)] // pre_exec, as explained above

use std::io;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Sender};

type Order = (Command, Sender<io::Result<Child>>);

static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();

/// Starts `command` so that it is killed when this process ends, however that happens.
pub(crate) fn spawn(mut command: Command) -> io::Result<Child> {
    die_with_parent(&mut command);
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in inbox {
                // The caller waits for the answer below, so the receiver is there.
                let _ = reply.send(command.spawn());
            }
        });
        orders
    });
    let (reply, answer) = mpsc::channel();
    spawner.send((command, reply)).expect("invariant: the spawner never ends");
    answer.recv().expect("invariant: the spawner answers every order")
}

#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command) {
    use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
    use std::os::unix::process::CommandExt;

    let parent = getpid();
    let before_exec = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have gone before the line above took effect.
        if getppid() != Some(parent) {
            return Err(io::Error::from(io::ErrorKind::NotConnected));
        }
        Ok(())
    };
    // SAFETY: the closure makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(before_exec);
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_command: &mut Command) {}
