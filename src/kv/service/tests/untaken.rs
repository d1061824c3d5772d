//! Answers that nobody takes, and messages of which something is left: what becomes of the pipeline.

use super::bounds::refusal;
use super::*;

use crate::door::Answerer;
use crate::door::limits::Bound;
use crate::door::pipeline::Outgoing;
use crate::incoming::Places;

const MIB: usize = 1024 * 1024;

/// A pipeline that is served without a connection, so that time can be what a test wants it to be.
struct BarePipeline {
    caller: Arc<crate::incoming::Caller>,
    metrics: Arc<DoorMetrics>,
    requests: mpsc::UnboundedSender<Result<PipelineRequest, tonic::Status>>,
    responses: Outgoing<KvFraming>,
    _draining: watch::Sender<bool>,
}

impl BarePipeline {
    async fn start(node: &FakeNode, limits: DoorLimits) -> Self {
        let (metrics, _) = metrics();
        let caller = Places::new(8, 0).admit(None).await;
        let (_draining, draining) = watch::channel(false);
        let door = Door {
            node: node.clone(),
            by: Answerer::of(node),
            metrics: metrics.clone(),
            limits: Arc::new(limits),
            draining,
            is_relayed: false,
        };
        let (requests, inbound) = mpsc::unbounded_channel();
        let inbound = UnboundedReceiverStream::new(inbound);
        let principal = crate::door::rights::Principal::everyone();
        let responses = crate::door::pipeline::start(door, Some(caller.clone()), principal, inbound);
        Self { caller, metrics, requests, responses, _draining }
    }

    fn send(&self, requests: impl IntoIterator<Item = Ask>) {
        let requests = requests.into_iter().map(|ask| TaggedRequest { tag: 0, request: Some(ask) });
        self.requests.send(Ok(PipelineRequest { requests: requests.collect() })).unwrap();
    }

    fn queued(&self) -> usize {
        self.metrics.pipeline_bytes().all()
    }

    async fn fills(&self, bytes: usize) {
        within(async {
            while self.queued() < bytes {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn answers_that_nobody_takes_are_let_go_of_and_their_pipeline_ends() {
    let node = FakeNode::new();
    node.put("k0", MIB);
    let bound = Bound { each: 8 * MIB, all: 16 * MIB };
    let limits = DoorLimits { queued_bytes: bound, ..DoorLimits::default() };
    let mut pipeline = BarePipeline::start(&node, limits).await;
    pipeline.send((0..100).map(|_| get("k0")));
    // However slowly they are taken, as long as they are.
    for _ in 0..6 {
        pipeline.fills(bound.each).await;
        tokio::time::sleep(Duration::from_secs(50)).await;
        assert_eq!(within(pipeline.responses.next()).await.unwrap().unwrap().responses.len(), 1);
    }
    pipeline.fills(bound.each).await;
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert!(pipeline.queued() >= bound.each);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(pipeline.queued(), 0, "nothing was taken for a minute");
    assert_eq!(pipeline.metrics.pipeline_requests().all(), 0);
    let end = within(pipeline.responses.next()).await.unwrap().unwrap_err();
    // Answers to writes may have been among them.
    assert_eq!(refusal(&end), (Code::Unknown, Reason::LimitReached));
}

/// A client that takes a little now and then keeps what waits for it longer, and not for ever.
#[tokio::test(start_paused = true)]
async fn answers_that_are_taken_byte_by_byte_are_let_go_of_in_the_end() {
    let node = FakeNode::new();
    node.put("k0", MIB);
    let bound = Bound { each: 8 * MIB, all: 16 * MIB };
    let limits = DoorLimits { queued_bytes: bound, ..DoorLimits::default() };
    let pipeline = BarePipeline::start(&node, limits).await;
    pipeline.send((0..100).map(|_| get("k0")));
    pipeline.fills(bound.each).await;
    let trickle = async |seconds: u64| {
        for _ in 0..seconds / 5 {
            tokio::time::sleep(Duration::from_secs(5)).await;
            pipeline.caller.progresses();
        }
    };
    trickle(580).await;
    assert!(pipeline.queued() >= bound.each, "bytes move");
    trickle(40).await;
    assert_eq!(pipeline.queued(), 0, "no message in ten minutes");
}

#[tokio::test(start_paused = true)]
async fn what_is_left_of_a_message_counts_while_it_waits() {
    let node = FakeNode::new();
    node.put("k0", 1);
    node.hold();
    let bound = Bound { each: MIB, all: 4 * MIB };
    let limits = || DoorLimits { unfinished_bytes: bound, ..DoorLimits::default() };
    let waits = async |pipeline: &BarePipeline| {
        reaches(&node.reading, MAX_IN_FLIGHT).await;
        within(async {
            while !pipeline.requests.is_closed()
                && pipeline.caller.holds(crate::incoming::Held::Unfinished) == 0
            {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    };
    let mut pipeline = BarePipeline::start(&node, limits()).await;
    pipeline.send((0..MAX_IN_FLIGHT).map(|_| get("k0")));
    pipeline.send((0..100).map(|_| get("k0")));
    waits(&pipeline).await;
    let held = pipeline.caller.holds(crate::incoming::Held::Unfinished);
    assert!((100 * 50..MIB).contains(&held), "{held}");
    node.release();
    let mut answered = 0;
    while answered < MAX_IN_FLIGHT + 100 {
        answered += within(pipeline.responses.next()).await.unwrap().unwrap().responses.len();
    }
    assert_eq!(pipeline.caller.holds(crate::incoming::Held::Unfinished), 0);

    node.hold();
    let mut pipeline = BarePipeline::start(&node, limits()).await;
    pipeline.send((0..MAX_IN_FLIGHT).map(|_| get("k0")));
    pipeline.send((0..MAX_IN_FLIGHT).map(|_| get("k0")));
    waits(&pipeline).await;
    assert_eq!(pipeline.caller.holds(crate::incoming::Held::Unfinished), 0, "too much");
    node.release();
    let mut answered = 0;
    let end = loop {
        match within(pipeline.responses.next()).await.unwrap() {
            Ok(message) => answered += message.responses.len(),
            Err(end) => break end,
        }
    };
    assert_eq!(answered, MAX_IN_FLIGHT, "what was begun is answered first");
    assert_eq!(refusal(&end), (Code::ResourceExhausted, Reason::LimitReached));
}
