//! A line between programs that carries what they say, counts it, and can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A port of this machine behind which another one is. Connections end when it is dropped.
#[derive(Debug)]
pub struct Line {
    address: SocketAddr,
    shared: Arc<LineState>,
}

#[derive(Debug)]
struct LineState {
    target: String,
    is_closed: AtomicBool,
    /// Bytes that were carried, towards the target and back.
    carried: [AtomicU64; 2],
    /// A connection that has carried so many bytes is cut.
    cut_after: AtomicU64,
    /// So many more.
    cuts_left: AtomicU32,
    cuts: AtomicU32,
    /// Most bytes that a connection carries in a second in each direction; 0: as many as there are.
    bytes_per_second: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

impl Line {
    /// A line to `target`, `host:port`.
    pub fn to(target: impl Into<String>) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(LineState {
            target: target.into(),
            is_closed: AtomicBool::new(false),
            carried: [AtomicU64::new(0), AtomicU64::new(0)],
            cut_after: AtomicU64::new(u64::MAX),
            cuts_left: AtomicU32::new(0),
            cuts: AtomicU32::new(0),
            bytes_per_second: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let line = shared.clone();
        thread::spawn(move || {
            for caller in listener.incoming() {
                if line.is_closed.load(SeqCst) {
                    return;
                }
                if let Ok(caller) = caller {
                    line.join(&caller);
                }
            }
        });
        Ok(Self { address, shared })
    }

    /// Where it is called, as `host:port`.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Bytes that were carried to the target.
    pub fn bytes_to_target(&self) -> u64 {
        self.shared.carried[0].load(SeqCst)
    }

    /// Bytes that were carried from the target.
    pub fn bytes_from_target(&self) -> u64 {
        self.shared.carried[1].load(SeqCst)
    }

    /// Cuts each connection that has carried `bytes`, as long as there were not `times` cuts.
    pub fn cut_after(&self, bytes: u64, times: u32) {
        self.shared.cuts_left.store(times, SeqCst);
        self.shared.cut_after.store(bytes, SeqCst);
    }

    /// How often that was done.
    pub fn cuts(&self) -> u32 {
        self.shared.cuts.load(SeqCst)
    }

    /// Has each connection carry at most so many bytes in a second, in each direction; 0: as many as there are.
    pub fn slow_down(&self, bytes_per_second: u64) {
        self.shared.bytes_per_second.store(bytes_per_second, SeqCst);
    }

    /// Ends every connection that there is.
    pub fn cut_all(&self) {
        let mut open = self.shared.open.lock().unwrap_or_else(PoisonError::into_inner);
        for end in open.drain(..) {
            // It may have ended by itself.
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.shared.is_closed.store(true, SeqCst);
        self.cut_all();
        // Wakes whoever accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl LineState {
    /// Joins `caller` and the target, until one of them ends the connection.
    fn join(self: &Arc<Self>, caller: &TcpStream) {
        let Ok(target) = TcpStream::connect(&self.target) else { return };
        let carried = Arc::new(AtomicU64::new(0));
        let ends = [caller, &target].map(|end| end.try_clone());
        let [Ok(from), Ok(to)] = ends else { return };
        for end in [&from, &to] {
            let _ = end.set_nodelay(true);
            if let Ok(end) = end.try_clone() {
                self.open.lock().unwrap_or_else(PoisonError::into_inner).push(end);
            }
        }
        for direction in 0..2 {
            let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { return };
            let (line, carried) = (self.clone(), carried.clone());
            thread::spawn(move || match direction {
                0 => line.carry(from, to, 0, &carried),
                _ => line.carry(to, from, 1, &carried),
            });
        }
    }

    fn carry(&self, mut from: TcpStream, mut to: TcpStream, direction: usize, carried: &AtomicU64) {
        let mut bytes = vec![0; 64 * 1024];
        let mut free = Instant::now();
        loop {
            let rate = self.bytes_per_second.load(SeqCst);
            // A slow line carries a little all the time, and not much now and then: it would seem dead in between.
            let most = if rate > 0 { (rate / 20).clamp(512, bytes.len() as u64) } else { bytes.len() as u64 };
            let Ok(count @ 1..) = from.read(&mut bytes[..most as usize]) else { break };
            if rate > 0 {
                thread::sleep(free.saturating_duration_since(Instant::now()));
                free = free.max(Instant::now()) + Duration::from_secs_f64(count as f64 / rate as f64);
            }
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
            self.carried[direction].fetch_add(count as u64, SeqCst);
            let all = carried.fetch_add(count as u64, SeqCst) + count as u64;
            if all >= self.cut_after.load(SeqCst) && self.is_cut() {
                break;
            }
        }
        for end in [from, to] {
            // It may have ended by itself.
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Whether one more may be cut.
    fn is_cut(&self) -> bool {
        let took = self.cuts_left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
        self.cuts.fetch_add(took.into(), SeqCst);
        took
    }
}
