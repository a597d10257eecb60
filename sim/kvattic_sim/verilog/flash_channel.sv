// Behavioural twin of one flash channel: an ideal one, which has every codeword at hand at the engine's full rate.
//
// Requests for codewords wait in a queue, each until its latency is over, and a V codeword (kind 1 of 0 to 3) also until its
// slot's value_open is set or the slot is in another epoch.  Of those that may go, the oldest goes, or a random one (shuffle).  Its beats follow each
// other, and the next codeword's, without a bubble unless stalls are asked for.  Padding beats are stored but not sent.
// A codeword of a page that was not programmed comes with `error` set and a media error.
//
// Operations are done at once and in order: PROGRAM takes the page's words, a word a cycle (pages of a block in order and
// once, otherwise it fails), ERASE forgets the block's pages, MAP and PROBE always succeed.
//
// Settings are sampled in each cycle; a change of `configure` seeds the random numbers, and counts codewords from 1
// again for the fault.
//
// Everything is clocked, internal state is assigned blocking in one process: Verilator and Icarus 11 agree on it.

module flash_channel #(
    // Fields of a request: the tag and, inside of it, slot, kind and epoch; page; codeword inside of the page.
    parameter REQUEST_BITS = 64,
    parameter TAG_AT = 0,
    parameter TAG_BITS = 16,
    parameter SLOT_AT = 0,        // counted from TAG_AT
    parameter SLOT_BITS = 2,
    parameter KIND_AT = 2,        // counted from TAG_AT
    parameter EPOCH_AT = 12,      // counted from TAG_AT
    parameter EPOCH_BITS = 4,
    parameter PAGE_AT = 16,
    parameter PAGE_BITS = 32,
    parameter INDEX_AT = 48,
    parameter INDEX_BITS = 5,
    // Fields of an operation, of its outcome, and of a word of page data.
    parameter OPERATION_BITS = 64,
    parameter OPERATION_OPCODE_AT = 0,
    parameter OPERATION_OPCODE_BITS = 3,
    parameter OPERATION_PAGE_AT = 3,
    parameter OPERATION_IDENTITY_AT = 32,
    parameter IDENTITY_BITS = 32,
    parameter OUTCOME_BITS = 64,
    parameter OUTCOME_IDENTITY_AT = 0,
    parameter OUTCOME_PAGE_AT = 32,
    parameter OUTCOME_STATUS_AT = 56,
    parameter OUTCOME_STATUS_BITS = 8,
    parameter PAGE_WORD_BITS = 88,
    parameter PAGE_WORD_DATA_AT = 0,
    parameter PROGRAM = 2,        // low bits of the opcodes
    parameter ERASE = 3,
    parameter PROGRAM_FAILED = 16, // status
    // Fields of a media error.
    parameter MEDIA_BITS = 31,
    parameter MEDIA_PAGE_AT = 0,
    parameter MEDIA_INDEX_AT = 24,
    parameter MEDIA_CAUSE_AT = 29,
    parameter MEDIA_CAUSE_BITS = 2,
    parameter ERASED = 2,         // cause
    // Fields of a beat that is sent.
    parameter BEAT_BITS = 81,
    parameter BEAT_TAG_AT = 0,
    parameter BEAT_DATA_AT = 16,
    parameter BEAT_LAST_AT = 80,
    parameter BEAT_ERROR_AT = 81,
    parameter WORD_BITS = 64,
    // Geometry.
    parameter BEATS = 64,         // words of a codeword that are sent
    parameter WORDS = 64,         // words of a codeword that are stored
    parameter CODEWORDS = 32,     // codewords of a page
    parameter PAGES = 16,         // page numbers
    parameter FRAMES = 16,        // pages that can be programmed at a time
    parameter UNIT_BITS = 3,      // low bits of a page number: plane and die
    parameter BLOCK_PAGE_BITS = 3, // next bits: page of the block
    parameter QUEUE = 64,
    parameter SLOTS = 4
) (
    input clk,
    input rst,
    input [31:0] channel,          // its number

    input request_valid,
    output reg request_ready,
    input [REQUEST_BITS-1:0] request_payload,
    output reg codeword_valid,
    input codeword_ready,
    output reg [BEAT_BITS-1:0] codeword_payload,
    input [SLOTS-1:0] value_open,
    input [SLOTS*EPOCH_BITS-1:0] epoch,
    input operation_valid,
    output reg operation_ready,
    input [OPERATION_BITS-1:0] operation_payload,
    input page_word_valid,
    output reg page_word_ready,
    input [PAGE_WORD_BITS-1:0] page_word_payload,
    output reg outcome_valid,
    input outcome_ready,
    output reg [OUTCOME_BITS-1:0] outcome_payload,
    output reg media_valid,
    output reg [MEDIA_BITS-1:0] media_payload,

    input [31:0] latency,          // cycles from a request's acceptance until its codeword may go
    input [31:0] jitter,           // up to so many random cycles more
    input shuffle,
    input [8:0] gap,               // probability, of 256, that no beat is offered in a cycle
    input [3:0] gap_pattern,       // cycles of four in which no beat is offered
    input [8:0] request_stall,     // the same two for request_ready
    input [3:0] request_stall_pattern,
    input [31:0] seed,
    input [2:0] fault,
    input [31:0] fault_number,     // which codeword, the first after `configure` is 1
    input [31:0] fault_value,      // corrupt: bits of the tag to flip; duplicate, delay: cycles
    input configure,

    output reg [31:0] served       // codewords begun since `configure`
);

  localparam [2:0] DROP = 1, DUPLICATE = 2, CORRUPT = 3, DELAY = 4;
  localparam PAGE_WORDS = CODEWORDS * WORDS;

  // Pages live in frames; frame 0 stands for pages that were not programmed.  Freed frames are a stack.
  reg [WORD_BITS-1:0] mem [0:(FRAMES+1)*PAGE_WORDS-1];
  reg [31:0] frame [0:PAGES-1];
  reg [31:0] spare [0:FRAMES-1];
  integer spares;

  // The queue: a place is a request's as long as its bit of `used` is set.
  reg [QUEUE-1:0] used;
  reg [REQUEST_BITS-1:0] waiting [0:QUEUE-1];
  reg [31:0] due [0:QUEUE-1];
  reg [31:0] order [0:QUEUE-1];
  reg [31:0] next_order;
  integer count;

  reg [31:0] now;
  reg [31:0] random;
  reg configured;

  // The codeword that is being sent.
  integer left;
  reg [63:0] address;
  reg [TAG_BITS-1:0] tag;
  reg missing;

  // The operation that is being done.
  reg busy;
  reg failed;
  integer taken;                  // words of the page so far
  reg [OPERATION_BITS-1:0] operation;
  reg [PAGE_BITS-1:0] page, sibling;

  integer i, place, slot;
  reg found, allowed;
  reg [2:0] wrong;
  reg [31:0] key, best;
  reg [TAG_BITS-1:0] wanted;

  function [31:0] step(input [31:0] x);  // xorshift
    begin
      step = x ^ (x << 13);
      step = step ^ (step >> 17);
      step = step ^ (step << 5);
    end
  endfunction

  initial begin
    for (i = 0; i < PAGES; i = i + 1) frame[i] = 0;
    for (i = 0; i < FRAMES; i = i + 1) spare[i] = FRAMES - i;
    for (i = 0; i < PAGE_WORDS; i = i + 1) mem[i] = 0;
    spares = FRAMES;
    configured = 0;
    busy = 0;
    failed = 0;
    taken = 0;
    operation = 0;
    page = 0;
    missing = 0;
    operation_ready = 0;
    page_word_ready = 0;
    outcome_valid = 0;
    outcome_payload = 0;
    media_valid = 0;
    media_payload = 0;
    used = 0;
    count = 0;
    left = 0;
    now = 0;
    random = 1;
    next_order = 0;
    address = 0;
    tag = 0;
    request_ready = 0;
    codeword_valid = 0;
    codeword_payload = 0;
    served = 0;
  end

  always @(posedge clk) begin
    now = now + 1;
    random = step(random);
    if (configure != configured) begin
      configured = configure;
      random = step(seed ^ ((channel + 1) * 32'h9E3779B1));
      if (random == 0) random = 1;
      served <= 0;
    end

    // ------------------------------------------------------------ codewords
    media_valid <= 0;
    if (codeword_ready || !codeword_valid) begin
      codeword_valid <= 0;
      if (left == 0 && count != 0) begin
        found = 0;
        place = 0;
        best = 0;
        for (i = 0; i < QUEUE; i = i + 1) begin
          if (used[i] && !((now - due[i]) >> 31)) begin
            wanted = waiting[i][TAG_AT +: TAG_BITS];
            slot = wanted[SLOT_AT +: SLOT_BITS];
            allowed = wanted[KIND_AT +: 2] != 2'd1 || value_open[slot]
                || wanted[EPOCH_AT +: EPOCH_BITS] != epoch[slot * EPOCH_BITS +: EPOCH_BITS];
            // Ages wrap: compare with the next one's.
            key = shuffle ? (order[i] ^ random) * 32'h9E3779B1 : next_order - order[i];
            if (allowed && (!found || key > best)) begin
              found = 1;
              best = key;
              place = i;
            end
          end
        end
        if (found) begin
          served <= served + 1;
          wrong = served + 1 == fault_number ? fault : 0;
          if (wrong == DELAY || wrong == DUPLICATE) begin
            due[place] = now + fault_value;
          end else begin
            used[place] = 0;
            count = count - 1;
          end
          if (wrong != DELAY && wrong != DROP) begin
            left = BEATS;
            tag = waiting[place][TAG_AT +: TAG_BITS];
            if (wrong == CORRUPT) tag = tag ^ fault_value[TAG_BITS-1:0];
            missing = waiting[place][PAGE_AT +: PAGE_BITS] >= PAGES;
            address = missing ? 0 : frame[waiting[place][PAGE_AT +: PAGE_BITS]];
            missing = address == 0;
            address = (address * CODEWORDS + (missing ? 0 : waiting[place][INDEX_AT +: INDEX_BITS])) * WORDS;
            media_valid <= missing;
            media_payload <= 0;
            media_payload[MEDIA_PAGE_AT +: PAGE_BITS] <= waiting[place][PAGE_AT +: PAGE_BITS];
            media_payload[MEDIA_INDEX_AT +: INDEX_BITS] <= waiting[place][INDEX_AT +: INDEX_BITS];
            media_payload[MEDIA_CAUSE_AT +: MEDIA_CAUSE_BITS] <= ERASED;
          end
        end
      end
      if (left != 0 && !gap_pattern[now[1:0]] && {1'b0, random[7:0]} >= gap) begin
        codeword_valid <= 1;
        codeword_payload[BEAT_TAG_AT +: TAG_BITS] <= tag;
        codeword_payload[BEAT_DATA_AT +: WORD_BITS] <= mem[address];
        codeword_payload[BEAT_LAST_AT] <= left == 1;
        codeword_payload[BEAT_ERROR_AT] <= missing;
        left = left - 1;
        address = address + 1;
      end
    end

    // ------------------------------------------------------------ requests
    if (request_valid && request_ready) begin
      place = 0;
      for (i = 0; i < QUEUE; i = i + 1) if (!used[i]) place = i;
      used[place] = 1;
      count = count + 1;
      waiting[place] = request_payload;
      due[place] = now + latency + (jitter == 0 ? 0 : (random >> 4) % (jitter + 1));
      order[place] = next_order;
      next_order = next_order + 1;
    end
    request_ready <= count != QUEUE && !request_stall_pattern[now[1:0]]
        && {1'b0, random[15:8]} >= request_stall;

    // ---------------------------------------------------------- operations
    if (outcome_ready) outcome_valid <= 0;
    if (operation_valid && operation_ready) begin
      busy = 1;
      taken = 0;
      operation = operation_payload;
      page = operation[OPERATION_PAGE_AT +: PAGE_BITS];
      failed = 0;
      if (operation[OPERATION_OPCODE_AT +: OPERATION_OPCODE_BITS] == PROGRAM) begin
        // Once, and behind the page before it in its block.
        sibling = page - (1 << UNIT_BITS);
        failed = page >= PAGES || spares == 0;
        if (!failed) failed = frame[page] != 0;
        if (!failed && page[UNIT_BITS +: BLOCK_PAGE_BITS] != 0) failed = frame[sibling] == 0;
        if (!failed) begin
          spares = spares - 1;
          frame[page] = spare[spares];
        end
      end else begin
        if (operation[OPERATION_OPCODE_AT +: OPERATION_OPCODE_BITS] == ERASE)
          for (i = 0; i < 1 << BLOCK_PAGE_BITS; i = i + 1) begin
            page[UNIT_BITS +: BLOCK_PAGE_BITS] = i;
            if (frame[page] != 0) begin
              spare[spares] = frame[page];
              spares = spares + 1;
              frame[page] = 0;
            end
          end
        taken = PAGE_WORDS;
      end
    end
    if (page_word_valid && page_word_ready) begin
      if (!failed) mem[frame[page] * PAGE_WORDS + taken] = page_word_payload[PAGE_WORD_DATA_AT +: WORD_BITS];
      taken = taken + 1;
    end
    if (busy && taken == PAGE_WORDS && (outcome_ready || !outcome_valid)) begin
      busy = 0;
      outcome_valid <= 1;
      outcome_payload[OUTCOME_IDENTITY_AT +: IDENTITY_BITS] <= operation[OPERATION_IDENTITY_AT +: IDENTITY_BITS];
      outcome_payload[OUTCOME_PAGE_AT +: PAGE_BITS] <= operation[OPERATION_PAGE_AT +: PAGE_BITS];
      outcome_payload[OUTCOME_STATUS_AT +: OUTCOME_STATUS_BITS] <= failed ? PROGRAM_FAILED : 0;
    end
    operation_ready <= !busy;
    page_word_ready <= busy && taken != PAGE_WORDS;

    if (rst) begin
      used = 0;
      count = 0;
      left = 0;
      busy = 0;
      request_ready <= 0;
      codeword_valid <= 0;
      operation_ready <= 0;
      page_word_ready <= 0;
      outcome_valid <= 0;
    end
  end

endmodule
